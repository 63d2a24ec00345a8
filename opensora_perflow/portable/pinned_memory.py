"""Pinned memory, which is for copies to CUDA and cannot be had without it.

Open-Sora 2.0 pins what it writes of EMA and master weights (utils/ckpt.py:279, 284, 364). ColossalAI 0.5 pins what it reads
of a checkpoint (checkpoint_io/utils.py: _pin_tensor).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from opensora_perflow.portable.imports import ModuleView, announce, has_cuda, source_mentions, when_imported

NAME = "pinned_memory"


def _unpinned_empty(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
    return torch.empty(*args, **options)


def _unpinned_tensor(tensor: Tensor, empty: bool = True) -> Tensor:
    return torch.empty_like(tensor, device="cpu") if empty else tensor


def _adapt_host(module: ModuleType) -> None:
    module.torch = ModuleView(module.torch, empty=_unpinned_empty)


def _adapt_colossalai(module: ModuleType) -> None:
    module._pin_tensor = _unpinned_tensor


def install() -> bool:
    if has_cuda() or not source_mentions("opensora", "utils/ckpt.py", "pin_memory=True"):
        return False
    when_imported("opensora.utils.ckpt", _adapt_host)
    when_imported("colossalai.checkpoint_io.utils", _adapt_colossalai)
    announce(NAME, "checkpoints go through ordinary memory, because there is no pinned memory without CUDA")
    return True
