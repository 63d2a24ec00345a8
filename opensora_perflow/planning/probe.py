"""What a plan is measured on: a velocity field, noise to start from, and the warp of each sample's time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.conventions import shift_grid
from opensora_perflow.method.solvers import Velocity, solve


@dataclass(frozen=True)
class Probe:
    """A field with noise for it.

    velocity: dx/dt, guided; velocity(x, t) with x like `noise` and flow times t [B].
    noise: [B, ...], float32, the state at t = 1.
    ratio: [B], float64, the host's warp of time (conventions.shift_time); None where there is none.
    """

    velocity: Velocity
    noise: Tensor
    ratio: Tensor | None = None

    def flow_times(self, times: Sequence[float] | Tensor) -> Tensor:
        """Untransformed times [n] -> flow times of each sample, [n, B], float64."""
        u = torch.as_tensor(times, dtype=torch.float64, device=self.noise.device)
        return shift_grid(u, len(self.noise), self.ratio)

    @torch.no_grad()
    def sample(self, grid: Sequence[float] | Tensor, method: str = "euler") -> Tensor:
        """Where the steps of a grid of untransformed times carry the noise."""
        return solve(self.velocity, self.noise, self.flow_times(grid), method=method)


def join(probes: Sequence[Probe]) -> Probe:
    """Several probes as one with all of their samples; each field is called with its own."""
    if len(probes) == 1:
        return probes[0]
    sizes = [len(probe.noise) for probe in probes]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        parts = zip(probes, x.split(sizes), t.split(sizes))
        return torch.cat([probe.velocity(own_x, own_t) for probe, own_x, own_t in parts])

    ratios = [probe.ratio for probe in probes]
    ratio = None if any(own is None for own in ratios) else torch.cat(ratios)
    return Probe(velocity, torch.cat([probe.noise for probe in probes]), ratio)
