r"""Distribution matching: where a student's samples should go so that they are distributed as the teacher's.

A state x_s at time s of the straight path is noised again to a time t in (s, 1]:

    x_t = alpha x_s + sigma noise,    alpha = (1 - t) / (1 - s),    sigma^2 = t^2 - (alpha s)^2.

Where x_s is distributed as the path at s, x_t is as the path at t. A field's velocity v at x_t gives the score of x_t's
distribution, -(x_t + (1 - t) v) / t. The mean of x_s given x_t follows. Of two distributions of x_s, the difference of
these means shows the way from one to the other; for s = 0 they are the predicted data.

Source: Distribution Matching Distillation (arXiv:2311.18828, eq. 7 and 8), whose noised clean data are s = 0, and DMD2
(arXiv:2405.14867); for windows that end at s > 0 Phased DMD (arXiv:2510.27684). The formulas for s > 0 are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.conventions import expand_like

LEAST, MOST = 0.02, 0.98
"""Times lie in this part of (s, 1], as in DMD."""


@dataclass(frozen=True)
class Renoised:
    """A state x_t [B, ...] and the time t [B] that it was noised to, from a state at time t_end [B]; times float64."""

    x: Tensor
    t: Tensor
    t_end: Tensor

    @property
    def variance(self) -> Tensor:
        """sigma^2, [B]."""
        return self.t**2 - (self.alpha * self.t_end) ** 2

    @property
    def alpha(self) -> Tensor:
        """[B]."""
        return (1 - self.t) / (1 - self.t_end)

    def mean_before(self, v: Tensor) -> Tensor:
        """The mean of x_s given x_t, where v [B, ...] is the velocity of x_t's distribution (Tweedie's formula)."""
        x, share = self.x, self.variance / self.t
        return ((1 - expand_like(share, x)) * x - expand_like(share * (1 - self.t), x) * v) / expand_like(self.alpha, x)

    def error(self, v: Tensor, x_end: Tensor) -> Tensor:
        """[B, ...]; its mean square is least for the velocity of x_t's distribution. For t_end = 0 it is v - (noise - data).

        The weight keeps the error of the noise, not of the state, at one scale for all times.
        """
        return (self.mean_before(v) - x_end) / expand_like(self.variance.sqrt() * (1 - self.t_end), x_end)


def renoise(x_end: Tensor, t_end: Tensor, generator: torch.Generator) -> Renoised:
    """Noise states x_end [B, ...] at times t_end [B], float64, < 1, to times drawn uniformly above."""
    u = torch.rand(len(x_end), dtype=torch.float64, device=x_end.device, generator=generator)
    t_end = t_end.to(x_end.device)
    t = t_end + (1 - t_end) * (LEAST + (MOST - LEAST) * u)
    noise = torch.randn(x_end.shape, device=x_end.device, generator=generator)
    bare = Renoised(noise, t, t_end)
    x = expand_like(bare.alpha, x_end) * x_end + expand_like(bare.variance.sqrt(), x_end) * noise
    return Renoised(x, t, t_end)
