"""What a training step works on: a window for each sample, the teacher's steps across it, and the times to train there."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.conventions import shift_time, unshift_time
from opensora_perflow.method.grids import linear_grid
from opensora_perflow.method.overlap import place_windows
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.method.windows import TimeWindows


@dataclass(frozen=True)
class Drawn:
    """A window for each sample of a batch, and the times at which the student is trained in it. All times float64."""

    window_idx: Tensor
    """[B], 0 is the noisiest."""
    route: Tensor
    """[R + 1, B], the steps of a sampler on its way to the window: route[window_idx] is the window's noisy edge."""
    solver_times: Tensor
    """[S + 1, B], the teacher's grid from the window's noisy edge to its clean one."""
    times: Tensor
    """[n, B], where the student is trained."""
    weights: Tensor
    """[n, B], what each time counts in the sample's loss; each column sums to 1."""

    @property
    def t_start(self) -> Tensor:
        return self.solver_times[0]

    @property
    def t_end(self) -> Tensor:
        return self.solver_times[-1]


def draw(
    windows: WarpedWindows,
    *,
    solver_steps: int | Tensor,
    edge_mass: float = 0.0,
    per_solve: int = 1,
    shares: Sequence[float] = (),
    overlap: float = 0.0,
    grids: Sequence[TimeWindows] = (),
    num_levels: int | None = None,
    given: Tensor | None = None,
    given_only: bool = False,
    as_given: bool = False,
    generator: torch.Generator | None = None,
) -> Drawn:
    """Draw windows, and times inside them.

    Args:
        windows: The student's, for this batch.
        shares: How often each window is drawn, relative to the others, see `fill_evenly`; (): each as often.
        solver_steps: The teacher's equal steps in each window, >= 1; or their times, [K, S + 1], untransformed.
        edge_mass, per_solve: Share of the times at the window's noisy edge, and n, see `mix_in_edge`.
        overlap, grids: Windows that overlap, see overlap.py.
        num_levels: Draw the time that chooses a window from 0, 1/levels, ..., (levels - 1)/levels; windows are then drawn by
            their share of those.
        given: Flow times [B] that choose the windows, in place of drawn ones.
        given_only: They are also the only times that are trained.
        as_given: Windows are those that the given times lie in, however often each; else they are filled evenly.
        generator: Where numbers are drawn from.

    Source: PeRFlow (arXiv:2405.07510), section 3, for one uniform time in a window; the rest is ours.
    """
    device, ratio = windows.device, windows.ratio
    if given is not None:
        u = unshift_time(given, ratio)
    elif num_levels is not None:
        u = torch.randint(num_levels, (windows.batch_size,), device=device, generator=generator).double() / num_levels
    else:
        u = torch.rand(windows.batch_size, dtype=torch.float64, device=device, generator=generator)
    if not given_only and not as_given and num_levels is None:
        u = fill_evenly(u, windows.windows, shares)
    placed = place_windows([windows.windows, *grids], u, overlap=overlap, generator=generator)
    if isinstance(solver_steps, Tensor):
        grid = solver_steps.to(device)[placed.window_idx].T
    else:
        grid = linear_grid(placed.u_start, placed.u_end, solver_steps)
    times, weights = u[None], torch.ones_like(u)[None]
    if not given_only:
        # 1 - [0, 1): a window holds its noisy edge and not its clean one.
        more = 1.0 - torch.rand((per_solve - 1, len(u)), dtype=torch.float64, device=device, generator=generator)
        times, weights = mix_in_edge(torch.cat([placed.times(more), times]), grid[0], edge_mass, generator)
    times = given[None] if given_only else shift_time(times, ratio)
    return Drawn(placed.window_idx, shift_time(placed.route, ratio), shift_time(grid, ratio), times, weights)


def fill_evenly(u: Tensor, windows: TimeWindows, shares: Sequence[float] = ()) -> Tensor:
    """Times u [B], uniform on [0, 1] -> times spread evenly inside each window, of which every window holds its share.

    The k-th of K intervals, as long as its share, is mapped to window k, linearly. Equal shares and uniform windows change
    nothing.

    Args:
        shares: Of each window, noisiest first, > 0, relative to their sum; (): equal ones.
    """
    if windows.is_uniform and not shares:
        return u
    if shares:
        below = [sum(shares[k:]) / sum(shares) for k in range(1, len(shares))]
        source = TimeWindows((1.0, *below, 0.0))
    else:
        source = TimeWindows.uniform(windows.num_windows)
    window_idx = source.lookup(u)
    from_start, from_end = source.bounds(window_idx)
    to_start, to_end = windows.bounds(window_idx)
    # From the noisy edge, which belongs to the window and stays exact.
    return (to_start - (from_start - u) * (to_start - to_end) / (from_start - from_end)).clamp(0.0, 1.0)


def mix_in_edge(
    times: Tensor, t_start: Tensor, edge_mass: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Put a share of the drawn times exactly at the window's noisy edge.

    There the target is a function of the input. Inside a window the lines of several pairs cross, and the student can only
    learn their mean. A few-step sampler evaluates at the edge first.

    Args:
        times: Drawn times inside each sample's window, [n, B], float64.
        t_start: The noisy edges, [B].
        edge_mass: Share in [0, 1]. With n = 1 each time is moved to the edge with this probability; with n > 1 one of the n
            is, always, and counts `edge_mass`, while the others share the rest: the same expected loss, without evaluating
            any pair twice at the same point.

    Returns:
        Times and their weights, [n, B] each; all weights are 1 / n if edge_mass is 0.
    """
    count = len(times)
    weights = torch.full_like(times, 1.0 / count)
    if edge_mass == 0:
        return times, weights
    times = times.clone()
    if count == 1:
        drawn = torch.rand(t_start.shape, dtype=t_start.dtype, device=t_start.device, generator=generator)
        times[0] = torch.where(drawn < edge_mass, t_start, times[0])
        return times, weights
    times[0] = t_start
    weights[0], weights[1:] = edge_mass, (1.0 - edge_mass) / (count - 1)
    return times, weights
