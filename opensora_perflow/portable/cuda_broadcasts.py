"""Open-Sora 2.0's broadcasts of a string and of an object, which go through CUDA.

utils/config.py:148 (sync_string) moves bytes there; datasets/utils.py:333 (sync_object_across_devices) names the device.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch.distributed as dist

from opensora_perflow.portable.imports import ModuleView, announce, has_cuda, on_cpu, source_mentions, when_imported

NAME = "cuda_broadcasts"


def _string_on_cpu(module: ModuleType) -> None:
    module.sync_string = on_cpu(module.sync_string)


def _objects_on_cpu(module: ModuleType) -> None:
    def broadcast_object_list(objects: list[Any], src: int = 0, group: Any = None, device: Any = None) -> None:
        dist.broadcast_object_list(objects, src, group)

    module.dist = ModuleView(module.dist, broadcast_object_list=broadcast_object_list)


def install() -> bool:
    if has_cuda() or not source_mentions("opensora", "utils/config.py", "def sync_string"):
        return False
    when_imported("opensora.utils.config", _string_on_cpu)
    when_imported("opensora.datasets.utils", _objects_on_cpu)
    announce(NAME, "names and batches are broadcast from the CPU's memory, because this machine has no CUDA device")
    return True
