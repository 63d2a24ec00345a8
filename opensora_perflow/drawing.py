"""What a training step works on: a window for each sample, the teacher's steps across it, and the times to train there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora_perflow.config import PeRFlowConfig
from opensora_perflow.conventions import shift_time, unshift_time
from opensora_perflow.overlap import place_windows
from opensora_perflow.schedule import (
    WeightedTimes,
    draw_positions,
    draw_times,
    fill_evenly,
    linear_grid,
    mix_in_edge,
    redraw_above,
    share_below,
    time_above_share,
)
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
    draws, discrete = config.draws, config.use_discrete_timesteps
    distribution = dict(distribution=config.sample_method, loc=config.loc, scale=config.scale)
    u, redrawn = None, False
    if given is not None:
        t, distribution, draw_ratio = given, {}, None  # a host that draws times itself draws them evenly
    else:
        u = draw_times(
            batch_size,
            **distribution,
            num_levels=num_timesteps if discrete else None,
            device=device,
            generator=generator,
        )
        t = shift_time(u, draw_ratio)
        redrawn = config.uniform_over_threshold is not None and draw_ratio is not None and not images
        if redrawn:
            t = redraw_above(t, config.uniform_over_threshold, generator)
    if draws.windows == "even" and not (given_only or redrawn or discrete):
        t = _fill_windows(t, partitions[0], distribution, draw_ratio, window_ratio)
    if not (discrete and u is not None and _same(draw_ratio, window_ratio)):  # else there is no way to and fro to be rounded
        u = unshift_time(t, window_ratio)
    placed = place_windows(partitions, u, overlap=draws.overlap, generator=generator)
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


def _fill_windows(
    t: Tensor, windows: TimeWindows, distribution: dict[str, Any], draw_ratio: Tensor | None, window_ratio: Tensor | None
) -> Tensor:
    """Drawn flow times [B], moved so that every window gets as many. Inside a window they are distributed as they were."""
    same = _same(draw_ratio, window_ratio)
    if same and windows.is_uniform and distribution.get("distribution", "uniform") == "uniform":
        return t

    def share(u: Tensor) -> Tensor:
        return share_below(u if same else unshift_time(shift_time(u, window_ratio), draw_ratio), **distribution)

    edges = torch.tensor(windows.edges, dtype=torch.float64, device=t.device)[:, None].expand(-1, len(t))
    filled = fill_evenly(share(unshift_time(t, window_ratio)), share(edges))
    return shift_time(time_above_share(filled, **distribution), draw_ratio)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
