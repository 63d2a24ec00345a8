"""What a training step works on: a window for each sample, the teacher's steps across it, and the times to train there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.conventions import shift_time, unshift_time
from opensora_perflow.method.grids import WeightedTimes, fill_evenly, linear_grid, mix_in_edge
from opensora_perflow.method.overlap import place_windows
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.training.recipe import PeRFlowConfig


@dataclass(frozen=True)
class DrawnWindows:
    """A window for each sample of a batch, and the times at which the student is trained in it. All times float64."""

    window_idx: Tensor
    """[B], 0 is the noisiest."""
    ratio: Tensor | None
    """[B], the warp of the windows' edges; None where there is none."""
    route: Tensor
    """[R + 1, B], the steps of a sampler on its way to the window: route[window_idx] is the window's noisy edge."""
    solver_times: Tensor
    """[S + 1, B], the teacher's grid from the window's noisy edge to its clean one."""
    drawn: WeightedTimes
    """[n, B]."""

    @property
    def t_start(self) -> Tensor:
        return self.solver_times[0]

    @property
    def t_end(self) -> Tensor:
        return self.solver_times[-1]


def draw_windows(
    config: PeRFlowConfig,
    partitions: Sequence[TimeWindows],
    batch_size: int,
    *,
    num_timesteps: int,
    solver_grids: Tensor | None = None,
    ratio: Tensor | None = None,
    given: Tensor | None = None,
    given_only: bool = False,
    single: bool = False,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> DrawnWindows:
    """Draw windows, each as often, and times inside them, as the config's `draws` say.

    Args:
        config: draws, use_discrete_timesteps, teacher_steps.
        partitions: The student's windows first, then the grids that it is trained for as well (see overlap.py).
        batch_size: B.
        num_timesteps: Levels of use_discrete_timesteps.
        solver_grids: The teacher's steps in each of the student's windows, [K, S + 1], untransformed; None: teacher_steps equal
            ones.
        ratio: Warp [B] of the windows, see `conventions.shift_time`; None: no warp.
        given: Flow times [B] that choose the windows, in place of drawn ones.
        given_only: They are also the only times that are trained.
        single: Train one time a sample.
        device, generator: Where and from what numbers are drawn.
    """
    draws = config.draws
    if given is not None:
        u = unshift_time(given, ratio)
    elif config.use_discrete_timesteps:
        u = torch.randint(num_timesteps, (batch_size,), device=device, generator=generator).double() / num_timesteps
    else:
        u = torch.rand(batch_size, dtype=torch.float64, device=device, generator=generator)
    if not (given_only or config.use_discrete_timesteps):
        u = fill_evenly(u, partitions[0])
    t = given if given_only else shift_time(u, ratio)
    placed = place_windows(partitions, u, overlap=draws.overlap, generator=generator)
    if solver_grids is None:
        grid = linear_grid(placed.u_start, placed.u_end, config.teacher_steps)
    else:
        grid = solver_grids.to(t.device)[placed.window_idx].T
    solver_times = shift_time(grid, ratio)
    drawn = WeightedTimes(t[None], torch.ones_like(t)[None])
    if not given_only:
        # From the noisy edge down, to which the window belongs: 1 - [0, 1).
        shape = ((1 if single else config.times_a_solve) - 1, len(t))
        more = 1.0 - torch.rand(shape, dtype=torch.float64, device=t.device, generator=generator)
        times = torch.cat([shift_time(placed.times(more), ratio), t[None]])
        drawn = mix_in_edge(times, solver_times[0], draws.edge_mass, generator)
    return DrawnWindows(placed.window_idx, ratio, shift_time(placed.route, ratio), solver_times, drawn)
