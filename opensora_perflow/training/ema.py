"""The average of a student's weights over its last training steps (EMA), which is what is sampled.

At a constant learning rate the weights of one step jitter around those that the training approaches. Their average does not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

HORIZON = 0.1
"""Steps that an average reaches back, 1 / (1 - decay), as a share of the steps of a run (benchmarks/ema.py)."""


def decay_of(steps: int) -> float:
    """The decay of a run of so many steps, in [0, 1).

    After the run the average holds exp(-1 / HORIZON) of the weights that the run began with.
    """
    return max(0.0, 1.0 - 1.0 / (HORIZON * steps))


class Ema:
    """Averages of tensors, in float32.

    Args:
        tensors: Name -> tensor, of which copies are the first averages.
        decay: What is left of an average in one update, 0..1.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.averages = {name: value.detach().float().clone() for name, value in tensors.items()}

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Move the averages towards tensors of the same names and shapes."""
        for name, average in self.averages.items():
            average.lerp_(tensors[name].detach().float(), 1.0 - self.decay)
