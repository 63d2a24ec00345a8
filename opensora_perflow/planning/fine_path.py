"""A field's own path from noise to data in fine steps, and the error that one large step along it makes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from opensora_perflow.checks import check_num_steps
from opensora_perflow.method.grids import linear_grid
from opensora_perflow.method.solvers import remember_last, solve
from opensora_perflow.planning.probe import Probe


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
def follow(
    probe: Probe, times: int | Sequence[float] = 32, *, substeps: int = 8, method: str = "euler", progress: bool = False
) -> FinePath:
    """Solve a field's ODE and keep the states at some untransformed times.

    Args:
        probe: The field and its noise.
        times: Candidate times, descending from 1 to 0; or M >= 1, the number of even intervals between them.
        substeps: Solver steps in each interval, >= 1. Field calls: M * substeps * evaluations of the method, and 1.
        method: A key of SOLVERS.

    Raises:
        ValueError: a number of intervals or substeps that is not an integer >= 1; states that are not finite.
    """
    if not isinstance(times, Sequence):
        check_num_steps(times, "the number of candidate intervals")
        times = uniform_grid(int(times))
    check_num_steps(substeps, "the solver steps between two candidates")
    ends = torch.tensor(times, dtype=torch.float64)
    grids = linear_grid(ends[:-1], ends[1:], substeps).T  # [M, substeps + 1]
    velocity = remember_last(probe.velocity)  # a step begins where its velocity was just recorded
    x, states, velocities = probe.noise, [probe.noise], []
    for grid in tqdm(grids, desc="following the teacher", unit="interval", disable=not progress):
        flow_times = probe.flow_times(grid)
        velocities.append(velocity(x, flow_times[0]))
        x = solve(velocity, x, flow_times, method=method)
        states.append(x)
    velocities.append(velocity(x, flow_times[-1]))
    if not bool(x.isfinite().all()):
        raise ValueError("the teacher's path holds NaN or infinity; check its weights, and use bf16 or fp32 instead of fp16")
    return FinePath(ends, probe.flow_times(ends), torch.stack(states), torch.stack(velocities))


def uniform_grid(num_steps: int) -> tuple[float, ...]:
    """N + 1 evenly spaced times from 1 to 0, as the host's own sampler takes them."""
    return tuple(1.0 - i / num_steps for i in range(num_steps)) + (0.0,)


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
