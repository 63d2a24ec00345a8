"""Open-Sora 2.0 as the host of a training run: `training.host.Host`, answered by what its scripts know."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.hosts.script import main_variable
from opensora_perflow.hosts.v1 import masters, parallel
from opensora_perflow.hosts.v1.network import settle
from opensora_perflow.hosts.v1.run_config import trained_students
from opensora_perflow.training.adapters import adapters

ZERO_AT_FIRST = ("cond_in.weight", "cond_in.bias")
"""The embedder of reference frames, which older weights and those of Flux lack. Its first weights are zeros."""
LATER = ("guidance_in.", *ZERO_AT_FIRST)
"""What a network may have and a file of its weights not."""
SAVES = ("save_model", "save_lora_as_pretrained")
"""Methods of a booster that open a checkpoint, called as (model, folder)."""


class OpenSora2:
    """The script of Open-Sora 2.0 that is calling; where none is, the process stands alone.

    Args:
        built: The teacher that was made where the student was built, or None.
    """

    def __init__(self, built: nn.Module | None = None) -> None:
        self.built = built

    def seed(self) -> int | None:
        return (_config() or {}).get("seed")

    def first_weights(self) -> str | None:
        return ((_config() or {}).get("model") or {}).get("from_pretrained")

    def weights(self, source: str | os.PathLike, network: nn.Module) -> Mapping[str, Tensor]:
        state, own = dict(read_state_dict(source)), network.state_dict()
        for name, value in own.items():
            if name not in state and name.startswith(LATER):
                state[name] = torch.zeros_like(value, device="cpu")
        return state

    def own_teacher(self, model: nn.Module, source: str | None) -> nn.Module | None:
        return model if self.built is None and source is None and adapters(model) else self.built

    def resumed(self) -> tuple[str, bool] | None:
        config = _config() or {}
        folder = config.get("load") or (config.get("lora_checkpoint") if config.get("lora_config") else None)
        return None if folder is None else (str(folder), True)

    def restore(self, model: nn.Module) -> str:
        folder, _ = self.resumed()
        return masters.restore_masters(_checkpoint(folder), model)

    def trained_students(self, weights: str) -> bool:
        return trained_students(weights)

    def before_each_save(self, write: Callable[[Path], None]) -> None:
        booster = main_variable("booster")
        for name in SAVES:
            save = getattr(booster, name, None)
            if save is not None:
                setattr(booster, name, _writing_first(save, write))

    def rank(self) -> int:
        return parallel.data_parallel_rank()

    def mean(self, value: float, device: torch.device | str) -> float:
        return parallel.mean_over_ranks(value, device)

    def gathered(self, value: Any) -> list[Any]:
        return parallel.gathered(value)

    def shared(self, *values: Any) -> Sequence[Any]:
        return parallel.shared(*values)

    def settled(self, model: nn.Module) -> nn.Module:
        boosted = main_variable("model")
        if isinstance(boosted, nn.Module):
            settle(boosted)
        return model


def _checkpoint(folder: str) -> Path:
    """The checkpoint that a folder is, or that its folder lora/ is in."""
    path = Path(folder)
    return path.parent if path.name == "lora" else path


def _config() -> Mapping[str, Any] | None:
    return main_variable("cfg")


def _writing_first(save: Callable[..., Any], write: Callable[[Path], None]) -> Callable[..., Any]:
    @functools.wraps(save)
    def saving(model: Any, checkpoint: str, *args: Any, **options: Any) -> Any:
        masters.write_masters(Path(checkpoint).parent, model)
        if not dist.is_initialized() or dist.get_rank() == 0:
            write(Path(checkpoint).parent)
        return save(model, checkpoint, *args, **options)

    return saving
