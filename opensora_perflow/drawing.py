"""What a training step works on: a window for each sample, the teacher's steps across it, and the times to train there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.config import PeRFlowConfig
from opensora_perflow.conventions import shift_time, unshift_time
from opensora_perflow.overlap import place_windows
from opensora_perflow.schedule import WeightedTimes, draw_positions, draw_times, linear_grid, mix_in_edge, redraw_above
from opensora_perflow.windows import TimeWindows


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
    draw_ratio: Tensor | None = None,
    window_ratio: Tensor | None = None,
    images: bool = False,
    given: Tensor | None = None,
    given_only: bool = False,
    single: bool = False,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> DrawnWindows:
    """Draw windows by a time per sample, and times inside them, as the config's `draws` say.

    Args:
        config: draws, sample_method and the keys beside it, teacher_steps.
        partitions: The student's windows first, then the grids that it is trained for as well (see overlap.py).
        batch_size: B.
        num_timesteps: Levels of use_discrete_timesteps.
        solver_grids: The teacher's steps in each of the student's windows, [K, S + 1], untransformed; None: teacher_steps equal
            ones.
        draw_ratio, window_ratio: Warps [B] of drawn times and of window edges, see `conventions.shift_time`; None: no warp.
        images: Images are not drawn again by uniform_over_threshold (as upstream).
        given: Flow times [B] that choose the windows, in place of drawn ones.
        given_only: They are also the only times that are trained.
        single: Train one time a sample.
        device, generator: Where and from what numbers are drawn.
    """
    draws, windows = config.draws, partitions[0]
    if given is not None:
        t = given
    else:
        u = draw_times(
            batch_size,
            distribution=config.sample_method,
            loc=config.loc,
            scale=config.scale,
            num_levels=num_timesteps if config.use_discrete_timesteps else None,
            device=device,
            generator=generator,
        )
        t = shift_time(u, draw_ratio)
        if config.uniform_over_threshold is not None and draw_ratio is not None and not images:
            t = redraw_above(t, config.uniform_over_threshold, generator)
        if draws.windows == "even" and not windows.is_uniform and not config.use_discrete_timesteps:
            t = shift_time(windows.spread(unshift_time(t, window_ratio)), window_ratio)
    placed = place_windows(partitions, unshift_time(t, window_ratio), overlap=draws.overlap, generator=generator)
    if solver_grids is None:
        grid = linear_grid(placed.u_start, placed.u_end, config.teacher_steps)
    else:
        grid = solver_grids.to(t.device)[placed.window_idx].T
    solver_times = shift_time(grid, window_ratio)
    drawn = WeightedTimes(t[None], torch.ones_like(t)[None])
    if not given_only:
        positions = draw_positions(
            (1 if single else config.times_a_solve) - (draws.distribution == "host"),
            batch_size,
            distribution="uniform" if draws.distribution == "host" else draws.distribution,
            beta=draws.beta,
            device=t.device,
            generator=generator,
        )
        times = shift_time(placed.times(positions), window_ratio)
        times = torch.cat([times, t[None]]) if draws.distribution == "host" else times
        drawn = mix_in_edge(times, solver_times[0], draws.edge_mass, generator)
    return DrawnWindows(placed.window_idx, window_ratio, shift_time(placed.route, window_ratio), solver_times, drawn)
