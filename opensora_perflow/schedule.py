"""Times: which ones training draws, and the grids that the teacher and the sampler step on. All in untransformed time."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from opensora_perflow.windows import TimeWindows

TIME_DISTRIBUTIONS = ("uniform", "logit-normal")
POSITION_DISTRIBUTIONS = ("uniform", "beta")


def draw_times(
    batch_size: int,
    *,
    distribution: str = "uniform",
    loc: float = 0.0,
    scale: float = 1.0,
    num_levels: int | None = None,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one time in [0, 1] for each sample of a batch.

    Args:
        batch_size: Number of times.
        distribution: "uniform" on [0, 1), or "logit-normal": the sigmoid of a normal variable with mean `loc` and standard
            deviation `scale` (the two that Open-Sora's `sample_method` knows).
        num_levels: Draw uniformly from 0, 1/n, ..., (n - 1)/n instead; uniform only.

    Returns:
        [B], float64.

    Raises:
        ValueError: unknown distribution.
    """
    if distribution == "uniform":
        if num_levels is not None:
            return torch.randint(num_levels, (batch_size,), device=device, generator=generator).double() / num_levels
        return torch.rand(batch_size, dtype=torch.float64, device=device, generator=generator)
    if distribution == "logit-normal":
        normal = torch.randn(batch_size, dtype=torch.float64, device=device, generator=generator)
        return torch.sigmoid(loc + scale * normal)
    raise ValueError(f"unknown time distribution {distribution!r}; known: {', '.join(TIME_DISTRIBUTIONS)}")


def share_below(u: Tensor, distribution: str = "uniform", loc: float = 0.0, scale: float = 1.0) -> Tensor:
    """Probability that a time which `draw_times` draws lies below u in [0, 1]; shaped like u."""
    return u if distribution == "uniform" else torch.special.ndtr((torch.logit(u) - loc) / scale)


def time_above_share(share: Tensor, distribution: str = "uniform", loc: float = 0.0, scale: float = 1.0) -> Tensor:
    """Inverse of `share_below`."""
    return share if distribution == "uniform" else torch.sigmoid(loc + scale * torch.special.ndtri(share))


def fill_evenly(u: Tensor, edges: Tensor) -> Tensor:
    """Uniform u in [0, 1], [B] -> values of which each interval between two edges gets as many, spread evenly inside it.

    Args:
        u: Interval k of as many equal ones is mapped to interval k, linearly.
        edges: [K + 1, B], descending from 1 to 0.
    """
    uniform = TimeWindows.uniform(len(edges) - 1)
    window_idx = uniform.lookup(u)
    from_start, from_end = uniform.bounds(window_idx)
    to_start, to_end = (edges.gather(0, (window_idx + i)[None])[0] for i in (0, 1))
    # From the noisy edge, which belongs to the window and stays exact.
    return (to_start - (from_start - u) * (to_start - to_end) / (from_start - from_end)).clamp(0.0, 1.0)


def redraw_above(t: Tensor, threshold: float, generator: torch.Generator | None = None) -> Tensor:
    """Times above `threshold` are drawn again, uniformly between it and 1 (Open-Sora 1.3's uniform_over_threshold)."""
    fresh = threshold + (1.0 - threshold) * torch.rand(t.shape, dtype=t.dtype, device=t.device, generator=generator)
    return torch.where(t > threshold, fresh, t)


@dataclass(frozen=True)
class WeightedTimes:
    """Several times for each sample of a batch, and what each counts in the sample's loss.

    times: [n, B], float64. weights: [n, B], float64; each column sums to 1.
    """

    times: Tensor
    weights: Tensor


def draw_positions(
    count: int,
    batch_size: int,
    *,
    distribution: str = "uniform",
    beta: tuple[float, float] = (2.0, 1.0),
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw places inside a window: 1 is its noisy edge, 0 its clean one.

    Args:
        count, batch_size: n and B.
        distribution: "uniform" on (0, 1], or "beta" with the parameters `beta` (a, b): a > b leans to the noisy edge,
            mean a / (a + b).

    Returns:
        [n, B], float64.

    Raises:
        ValueError: unknown distribution.
    """
    shape = (count, batch_size)
    if distribution == "uniform":  # 1 - [0, 1): windows hold their noisy edge and not their clean one
        return 1.0 - torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
    if distribution == "beta":
        # A ratio of gamma variables; torch.distributions.Beta does the same and takes no generator.
        rising, falling = (
            torch._standard_gamma(torch.full(shape, value, dtype=torch.float64, device=device), generator=generator)
            for value in beta
        )
        return rising / (rising + falling)
    raise ValueError(f"unknown distribution of places in a window {distribution!r}; known: {', '.join(POSITION_DISTRIBUTIONS)}")


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
