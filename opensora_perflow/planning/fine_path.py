"""A field's own path from noise to data in fine steps, and the error that one large step along it makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from opensora_perflow.planning.probe import Probe
from opensora_perflow.schedule import check_num_steps
from opensora_perflow.solvers import solve


@dataclass(frozen=True)
class FinePath:
    """times: M + 1 candidate times, untransformed, descending from 1 to 0, float64. flow_times [M + 1, B]: the same, warped.
    states, velocities: [M + 1, B, ...], the solution there and dx/dt along it."""

    times: Tensor
    flow_times: Tensor
    states: Tensor
    velocities: Tensor

    @property
    def endpoints(self) -> Tensor:
        """The states at t = 0, [B, ...]."""
        return self.states[-1]


@torch.no_grad()
def follow(probe: Probe, num_candidates: int = 32, *, substeps: int = 8, method: str = "euler", progress: bool = False) -> FinePath:
    """Solve a field's ODE and keep the states at evenly spaced untransformed times.

    Args:
        probe: The field and its noise.
        num_candidates: M >= 1, intervals between the states that are kept.
        substeps: Solver steps in each, >= 1. Field calls: M (substeps * evaluations of the method + 1) + 1.
        method: A key of SOLVERS.

    Raises:
        ValueError: num_candidates or substeps not an integer >= 1; states that are not finite.
    """
    check_num_steps(num_candidates, "the number of candidate intervals")
    check_num_steps(substeps, "the solver steps between two candidates")
    times = 1.0 - torch.arange(num_candidates * substeps + 1, dtype=torch.float64) / (num_candidates * substeps)
    times[-1] = 0.0
    flow_times = probe.flow_times(times)
    x, states, velocities = probe.noise, [probe.noise], []
    for k in tqdm(range(num_candidates), desc="following the teacher", unit="interval", disable=not progress):
        velocities.append(probe.velocity(x, flow_times[k * substeps]))
        x = solve(probe.velocity, x, flow_times[k * substeps : (k + 1) * substeps + 1], method=method)
        states.append(x)
    velocities.append(probe.velocity(x, flow_times[-1]))
    if not bool(x.isfinite().all()):
        raise ValueError("the teacher's path holds NaN or infinity; check its weights, and use bf16 or fp32 instead of fp16")
    return FinePath(times[::substeps], flow_times[::substeps], torch.stack(states), torch.stack(velocities))


@torch.no_grad()
def step_errors(path: FinePath) -> Tensor:
    r"""Root mean square of x(t_i) + (t_j - t_i) v(x(t_i), t_i) - x(t_j): the error of one Euler step along the path.

    Returns:
        [M + 1, M + 1], float64, for i < j; 0 elsewhere.
    """
    count = len(path.times)
    errors = torch.zeros(count, count, dtype=torch.float64)
    shape = (-1, *[1] * (path.states.dim() - 2))
    for i in range(count - 1):
        dt = (path.flow_times[i + 1 :] - path.flow_times[i]).to(path.states.device, path.states.dtype)
        for j, step in enumerate(dt, start=i + 1):  # one at a time: all of them would be a copy of the whole path
            landed = path.states[i] + step.reshape(shape) * path.velocities[i]
            errors[i, j] = (landed - path.states[j]).square().mean().sqrt().item()
    return errors
