"""The CUDA checks of the started script itself: `assert torch.cuda.is_available()` and its device count.

scripts/train.py refuses to start without CUDA (v1.2.0:43, v1.3:54) and divides by the number of devices (v1.2.0:51,
v1.3:62). Both lines are in the script's own frame. Everyone else, the libraries and the other scripts that choose
"cuda" or "cpu" by the same call (scripts/inference.py v1.2.0:46), must keep seeing the truth.
"""

from __future__ import annotations

import functools
import linecache
import sys
from types import FrameType

import torch

from opensora_perflow.portable.imports import announce, has_cuda

NAME = "script_assert"


def _script_line(frame: FrameType) -> str:
    """The source line the script is at, or "" where `frame` is not the script's (the one module named __main__)."""
    if frame.f_globals.get("__name__") != "__main__":
        return ""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def install() -> bool:
    if has_cuda():
        return False
    is_available, device_count = torch.cuda.is_available, torch.cuda.device_count

    @functools.wraps(is_available)
    def is_available_for_asserts() -> bool:
        return is_available() or _script_line(sys._getframe(1)).startswith("assert ")

    @functools.wraps(device_count)
    def device_count_for_set_device() -> int:
        # rank % device_count(): any number but 0 will do, since set_device chooses nothing here (see cuda_queue).
        return device_count() or int("set_device(" in _script_line(sys._getframe(1)))

    # Global, because the script looks both names up in torch.cuda and its own globals do not exist yet. Narrow all the same:
    # the answer differs for an `assert` or `set_device` line of the script alone.
    torch.cuda.is_available = is_available_for_asserts
    torch.cuda.device_count = device_count_for_set_device
    announce(NAME, "the script's own assert on CUDA passes, because this machine has none; all other code is told so")
    return True
