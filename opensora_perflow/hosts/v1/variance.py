"""The learned variance of iddpm's networks: kept as the teacher's while the student's other half is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.v1.stdit import halves


class VarianceMatch:
    """A student's call that also compares its variance half with the teacher's, for the same input.

    Both halves share the network's trunk: without a loss of its own the variance would drift, and a student trained on
    epsilon could no longer be sampled by iddpm. Costs one evaluation of the teacher for each of the student that is trained.
    """

    def __init__(self, call: Callable[..., Tensor], teacher: nn.Module) -> None:
        self._call, self._teacher = call, teacher
        self._errors: list[Tensor] = []

    def __call__(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        output = self._call(x, timestep, **inputs)
        _, variance = halves(output, x.shape[1])
        if variance is not None and variance.requires_grad:  # an objective's evaluations without gradient teach nothing
            with torch.no_grad():
                _, kept = halves(self._teacher(x, timestep, **inputs), x.shape[1])
            self._errors.append((variance - kept).square())
        return output

    @property
    def error(self) -> Tensor | None:
        """Squared error, [B, C, T, H, W], averaged over the calls so far; None if the network has no variance half."""
        return torch.stack(self._errors).mean(dim=0) if self._errors else None
