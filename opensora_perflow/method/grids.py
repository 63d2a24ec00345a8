"""Times: which ones training draws, and the grids that the teacher and the sampler step on. All in untransformed time."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from opensora_perflow.method.windows import TimeWindows

TIME_DISTRIBUTIONS = ("uniform", "logit-normal")


def fill_evenly(u: Tensor, windows: TimeWindows) -> Tensor:
    """Times u [B], uniform on [0, 1] -> times of which every window holds as many, spread evenly inside it.

    The k-th of K equal intervals is mapped to window k, linearly. With uniform windows that changes nothing.
    """
    if windows.is_uniform:
        return u
    uniform = TimeWindows.uniform(windows.num_windows)
    window_idx = uniform.lookup(u)
    from_start, from_end = uniform.bounds(window_idx)
    to_start, to_end = windows.bounds(window_idx)
    # From the noisy edge, which belongs to the window and stays exact.
    return (to_start - (from_start - u) * (to_start - to_end) / (from_start - from_end)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class WeightedTimes:
    """Several times for each sample of a batch, and what each counts in the sample's loss.

    times: [n, B], float64. weights: [n, B], float64; each column sums to 1.
    """

    times: Tensor
    weights: Tensor


def mix_in_edge(times: Tensor, t_start: Tensor, edge_mass: float, generator: torch.Generator | None = None) -> WeightedTimes:
    """Put a share of the drawn times exactly at the window's noisy edge.

    There the target is a function of the input, while inside a window the lines of several pairs cross and the student can
    only learn their mean; a few-step sampler evaluates at the edge first.

    Args:
        times: Drawn times inside each sample's window, [n, B], float64.
        t_start: The noisy edges, [B].
        edge_mass: Share in [0, 1]. With n = 1 each time is moved to the edge with this probability; with n > 1 one of the n
            is, always, and counts `edge_mass`, while the others share the rest: the same expected loss, without evaluating
            any pair twice at the same point.

    Returns:
        WeightedTimes of the same shape; all weights are 1 / n if edge_mass is 0.
    """
    count = len(times)
    weights = torch.full_like(times, 1.0 / count)
    if edge_mass == 0:
        return WeightedTimes(times, weights)
    times = times.clone()
    if count == 1:
        drawn = torch.rand(t_start.shape, dtype=t_start.dtype, device=t_start.device, generator=generator)
        times[0] = torch.where(drawn < edge_mass, t_start, times[0])
        return WeightedTimes(times, weights)
    times[0] = t_start
    weights[0], weights[1:] = edge_mass, (1.0 - edge_mass) / (count - 1)
    return WeightedTimes(times, weights)


def linear_grid(start: Tensor, end: Tensor, num_steps: int) -> Tensor:
    """Uniform grid from `start` [B] to `end` [B] with both ends exact: [num_steps + 1, B], float64.

    Raises:
        ValueError: num_steps < 1.
    """
    check_num_steps(num_steps)
    fraction = torch.arange(num_steps + 1, dtype=torch.float64, device=start.device)[:, None] / num_steps
    grid = start + (end - start) * fraction
    grid[-1] = end
    return grid


def sampling_grid(windows: TimeWindows, num_steps: int) -> tuple[float, ...]:
    """Grid of `num_steps` sampling steps over the whole of [1, 0].

    With num_steps >= K every window edge is a grid point: each window gets num_steps // K equal steps and the remainder goes
    to the noisiest windows, one each (as PeRFlow's own sampler distributes them). If K divides num_steps and the windows are
    uniform, or if K is 1, this is the host's own uniform grid. With fewer steps than windows, each step spans whole windows,
    as evenly as their number allows: possible, but the student was not trained for steps across an edge.

    Where the windows come from a plan that holds a grid of so many steps, it is that one.

    Returns:
        num_steps + 1 times, descending from 1 to 0.

    Raises:
        ValueError: num_steps is not an integer >= 1.
    """
    check_num_steps(num_steps)
    planned = windows.grid_of(int(num_steps))
    if planned is not None:
        return planned
    num_windows = windows.num_windows
    if num_steps < num_windows:
        return tuple(windows.edges[round(i * num_windows / num_steps)] for i in range(num_steps + 1))
    each, extra = divmod(num_steps, num_windows)
    grid = [1.0]
    for k, (start, end) in enumerate(zip(windows.edges, windows.edges[1:])):
        steps = each + (k < extra)
        grid += [start + (end - start) * i / steps for i in range(1, steps)] + [end]
    return tuple(grid)


def check_num_steps(num_steps: int, name: str = "the number of steps") -> None:
    """Raises ValueError unless num_steps is an integer >= 1."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, Real) or int(num_steps) != num_steps or num_steps < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {num_steps!r}")
