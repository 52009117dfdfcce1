"""Where in the user's code something happens."""

import os
import sys
from types import FrameType

import torch

TORCH = os.path.dirname(torch.__file__) + os.sep
HERE = os.path.dirname(__file__) + os.sep


def users_frame() -> FrameType | None:
    """The innermost frame of the user's code while a network is recorded; None where all of it is torch's and ours.

    As in `nn.Sequential`.
    """
    frame = sys._getframe(1)
    while frame and not (frame.f_code.co_name == "record" and frame.f_code.co_filename.startswith(HERE)):
        if not frame.f_code.co_filename.startswith((TORCH, HERE)):
            return frame
        frame = frame.f_back
    return None


def line_of(frame: FrameType | None) -> str:
    """File and line of a frame; empty where there is none."""
    return f"{os.path.basename(frame.f_code.co_filename)}, line {frame.f_lineno}" if frame is not None else ""


def users_line() -> str:
    """The line of the user's code that runs."""
    return line_of(users_frame())
