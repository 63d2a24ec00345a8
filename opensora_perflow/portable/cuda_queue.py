"""torch.cuda.synchronize and set_device where there is no CUDA device to wait for or to choose.

The host calls `synchronize` unconditionally: Timer in utils/misc.py (v1.2.0:372 and 377, v1.3:374 and 381) around every
step, print_memory_usage in utils/inference_utils.py (v1.3:666) after the video is written. scripts/train.py calls
`set_device` (v1.2.0:51, v1.3:62).
"""

from __future__ import annotations

from typing import Any

import torch

from opensora_perflow.portable.imports import announce, has_cuda

NAME = "cuda_queue"


def synchronize(device: Any = None) -> None:
    """Return at once: without a device there is no queue of kernels, and CPU work is done when its call returns."""


def set_device(device: Any) -> None:
    """Return at once: without a device there is none to choose."""


def install() -> bool:
    if has_cuda():
        return False
    # Global, because the callers are spread over scripts and modules and look the names up in torch.cuda.
    torch.cuda.synchronize = synchronize
    torch.cuda.set_device = set_device
    announce(NAME, "torch.cuda.synchronize and set_device do nothing, because this machine has no CUDA device")
    return True
