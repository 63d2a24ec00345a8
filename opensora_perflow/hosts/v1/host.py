"""Open-Sora 1.x as the host of a training run: `training.host.Host`, answered by what its scripts know."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.v1 import checkpoints, parallel, run_config
from opensora_perflow.hosts.v1.network import settle, unwrap
from opensora_perflow.hosts.v1.weights import read_weights


class OpenSora:
    """The Open-Sora script that is calling; where none is, the process stands alone."""

    def seed(self) -> int | None:
        return run_config.host_seed()

    def first_weights(self) -> str | None:
        return run_config.loaded_weights()

    def weights(self, source: str | os.PathLike, network: nn.Module) -> Mapping[str, Tensor]:
        return read_weights(source, network)

    def own_teacher(self, model: nn.Module, source: str | None) -> None:
        return None

    def resumed(self) -> tuple[str, bool] | None:
        return checkpoints.resumed_checkpoint()

    def trained_students(self, weights: str) -> bool:
        return run_config.trained_students(weights)

    def before_each_save(self, write: Callable[[Path], None]) -> None:
        checkpoints.before_each_save(write)

    def rank(self) -> int:
        return parallel.data_parallel_rank()

    def mean(self, value: float, device: torch.device | str) -> float:
        return parallel.mean_over_ranks(value, device)

    def gathered(self, value: Any) -> list[Any]:
        return parallel.gathered(value)

    def shared(self, *values: Any) -> Sequence[Any]:
        return parallel.shared(*values)

    def settled(self, model: nn.Module) -> nn.Module:
        settle(model)
        return unwrap(model)
