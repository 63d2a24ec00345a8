"""The CUDA checks of Open-Sora 2.0's setup_device, which are those of 1.x's scripts (see script_assert).

utils/train.py:63 asserts CUDA, and :66 divides by the number of devices. utils/cai.py:31 allows a group of tensor or sequence
parallelism as many processes as there are devices. Nothing else of these modules asks.
"""

from __future__ import annotations

import os
from types import ModuleType

from opensora_perflow.portable.imports import ModuleView, announce, has_cuda, source_mentions, when_imported

NAME = "device_setup"


def _processes() -> int:
    """Of this machine: each is a device of its own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _show_devices(module: ModuleType) -> None:
    # The device is chosen by set_device, which chooses nothing here (see cuda_queue).
    cuda = ModuleView(module.torch.cuda, is_available=lambda: True, device_count=_processes)
    module.torch = ModuleView(module.torch, cuda=cuda)


def install() -> bool:
    if has_cuda() or not source_mentions("opensora", "utils/train.py", "assert torch.cuda.is_available()"):
        return False
    for name in ("opensora.utils.train", "opensora.utils.cai"):
        when_imported(name, _show_devices)
    announce(NAME, "setup_device's assert on CUDA passes, because this machine has none; all other code is told so")
    return True
