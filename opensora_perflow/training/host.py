"""What a training run asks of the host that it runs in. hosts/ answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Host(Protocol):
    """Every process of a run asks, and the answers must lead all of them the same way."""

    def seed(self) -> int | None:
        """The run's seed; None where the host has none."""

    def first_weights(self) -> str | None:
        """Where the network's weights came from before any training; None where nobody knows."""

    def weights(self, source: str | os.PathLike, network: nn.Module) -> Mapping[str, Tensor]:
        """What the host's own loader would give a network from a source: with what the network computes, and what older
        files lack. Whether that fits is not the host's to say."""

    def own_teacher(self, model: nn.Module, source: str | None) -> nn.Module | None:
        """The teacher that the host keeps apart from the student's trained weights, with those of `source` if it is given;
        None: the run copies one."""

    def resumed(self) -> tuple[str, bool] | None:
        """The checkpoint that the run goes on from, and whether its steps are counted on; None for a run from the start."""

    def restore(self, model: nn.Module) -> str:
        """Put back what the host's own loader left out of the resumed checkpoint's weights. What the run goes on with, in
        words."""

    def trained_students(self, weights: str) -> bool:
        """Did a PeRFlow run write these weights, as far as the host's own files tell?"""

    def before_each_save(self, write: Callable[[Path], None]) -> None:
        """Have `write(folder)` called, in one process, before a checkpoint is saved into a folder."""

    def rank(self) -> int:
        """Data-parallel rank: which share of the samples this process works on."""

    def mean(self, value: float, device: torch.device | str) -> float:
        """The mean of a number over all processes."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over all processes in the place of tensors, which have the same shapes in each."""

    def gathered(self, value: Any) -> list[Any]:
        """What each of the processes gives, which can be pickled, in all of them and in the same order."""

    def shared(self, *values: Any) -> Sequence[Any]:
        """The values of the first of the processes that work on the same samples, in all of these."""

    def settled(self, model: nn.Module) -> nn.Module:
        """The network inside a wrapped model, with its weights complete."""

    def folder(self) -> Path | None:
        """Where the run writes its checkpoints, in the first of all processes; None in others, and where nobody knows."""

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers where the host shows its own, in the process that does so."""

    def device(self) -> torch.device | str:
        """Where this process's numbers are, for `mean`."""

    def ema(self) -> nn.Module | None:
        """The host's average of the student's weights; None where nobody knows of one."""

    def rate(self) -> float | None:
        """The optimizer's learning rate; None where nobody knows."""

    def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate, of now and of what a schedule comes to."""

    def keep_state(self) -> Callable[[], None]:
        """Copy what a step changes: weights, optimizer and average. What is returned puts the copy back."""
