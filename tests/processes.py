"""Python scripts as processes of their own."""

import os
import socket

from tests import ROOT


def environment(**more):
    """In which a script finds the package and has one thread, as the tests have: then float32 sums are alike."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **more}


def free_port():
    """One that nobody listens at."""
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]
