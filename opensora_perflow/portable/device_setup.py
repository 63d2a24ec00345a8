"""The CUDA checks of Open-Sora 2.0's setup_device, which are those of 1.x's scripts (see script_assert).

utils/train.py:63 asserts CUDA, and :66 divides by the number of devices. Nothing else of that module asks.
"""

from __future__ import annotations

from types import ModuleType

from opensora_perflow.portable.imports import ModuleView, announce, has_cuda, source_mentions, when_imported

NAME = "device_setup"


def _show_one_device(module: ModuleType) -> None:
    # The device is chosen by set_device, which chooses nothing here (see cuda_queue).
    cuda = ModuleView(module.torch.cuda, is_available=lambda: True, device_count=lambda: 1)
    module.torch = ModuleView(module.torch, cuda=cuda)


def install() -> bool:
    if has_cuda() or not source_mentions("opensora", "utils/train.py", "assert torch.cuda.is_available()"):
        return False
    when_imported("opensora.utils.train", _show_one_device)
    announce(NAME, "setup_device's assert on CUDA passes, because this machine has none; all other code is told so")
    return True
