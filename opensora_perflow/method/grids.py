"""Grids of times that the teacher and the sampler step on, untransformed."""

import torch
from torch import Tensor

from opensora_perflow.checks import check_num_steps
from opensora_perflow.method.windows import TimeWindows


def linear_grid(start: Tensor, end: Tensor, num_steps: int) -> Tensor:
    """Uniform grid of num_steps >= 1 steps from `start` [B] to `end` [B] with both ends exact: [num_steps + 1, B], float64."""
    fraction = torch.arange(num_steps + 1, dtype=torch.float64, device=start.device)[:, None] / num_steps
    grid = start + (end - start) * fraction
    grid[-1] = end
    return grid


def sampling_grid(windows: TimeWindows, num_steps: int) -> tuple[float, ...]:
    """Grid of `num_steps` sampling steps over the whole of [1, 0].

    With num_steps >= K every window edge is a grid point. Each window gets num_steps // K equal steps. The remainder goes to
    the noisiest windows, one each, as in PeRFlow's own sampler. If K divides num_steps and the windows are uniform, or if K is
    1, this is the host's own uniform grid. With fewer steps than windows, each step spans whole windows, as evenly as their
    number allows: possible, but the student was not trained for steps across an edge.

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
