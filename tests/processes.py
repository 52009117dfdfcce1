"""Python scripts as processes of their own."""

import os
import socket

from tests import ROOT


def environment(**more):
    """In which a script finds the package and has one thread, as the tests have: then float32 sums are alike.

    It starts W&B's service by itself: a service of ours would write its log where we stand, not where it stands.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **more}


def free_port():
    """One that nobody listens at."""
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]
