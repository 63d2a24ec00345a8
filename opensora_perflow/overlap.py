r"""Windows that overlap: which of them trains a time, and where it begins and ends. All in untransformed time.

A student of disjoint windows turns at their edges, so a step across an edge follows the window that it has left. Here a time
may belong to several windows, and window k is drawn for it with probability w_k(u), where sum_k w_k(u) = 1. A squared error is
least at the mean of its random target, so the student learns the windows' own velocities v_k, blended:

    v*(x, u) = sum_k pi_k v_k(x, u),     pi_k = w_k(u) p_k(x) / sum_j w_j(u) p_j(x),

with p_k the density at time u of the states on window k's lines; all windows follow one teacher, so the p_k are nearly equal
and pi_k is nearly w_k. Two families of weights, which combine:

overlap  Each window is extended beyond its inner edges; there the weight falls linearly from one window to the next, 1/2 at
         the edge itself.
grids    Several partitions of [1, 0], equally often: the student's windows, and the steps of uniform grids that it is to be
         sampled with. At a time where only one of the grids has an edge, that grid's own step can be learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.windows import TimeWindows


@dataclass(frozen=True)
class PlacedWindows:
    """One window per sample. All times float64, untransformed."""

    window_idx: Tensor
    """[B], the index in the window's own partition; 0 is the noisiest."""
    u_edge: Tensor
    """[B], the noisy edge, where a sampler with one step a window evaluates."""
    u_start: Tensor
    u_end: Tensor
    """[B], the noisy and the clean end of the window, extended over its edges."""
    ramp_start: Tensor
    ramp_end: Tensor
    """[B], by how much, >= 0; the weight rises and falls over twice that."""
    route: Tensor
    """[R + 1, B], the steps of a sampler on its way to the window: route[window_idx] is u_start."""

    def times(self, positions: Tensor) -> Tensor:
        """Places [n, B] in (0, 1], 1 the noisy end and 0 the clean one -> times in the window.

        Uniform places become times with the density of the window's weight: constant inside, linear over the ramps. A window
        without ramps maps linearly.
        """
        edge, end = self.u_start - self.ramp_start, self.u_end + self.ramp_end
        u = end + (edge - end) * positions
        # The mass q of a ramp of 2 d lies within 2 sqrt(d q) of its outer end.
        from_end, from_start = u - end, edge - u
        on_end, on_start = from_end < self.ramp_end, from_start < self.ramp_start
        u = torch.where(on_end, self.u_end + 2 * (self.ramp_end * from_end).clamp(min=0).sqrt(), u)
        return torch.where(on_start, self.u_start - 2 * (self.ramp_start * from_start).clamp(min=0).sqrt(), u)


def place_windows(
    partitions: Sequence[TimeWindows],
    u: Tensor,
    *,
    overlap: float = 0.0,
    generator: torch.Generator | None = None,
) -> PlacedWindows:
    """Draw a window for each time, with the weights of this page.

    Args:
        partitions: One or more; each is as likely.
        u: Times in [0, 1], [B], float64.
        overlap: How far windows extend over an inner edge, as a share 0..1/2 of the narrower of the two windows there.
        generator: Nothing is drawn from it where there is one partition and no overlap.

    Returns:
        PlacedWindows whose windows hold their times.

    Raises:
        ValueError: an overlap outside 0..1/2 (the ramps of one window would meet).
    """
    if not 0 <= overlap <= 0.5:
        raise ValueError(f"overlap must lie in 0..0.5 (a share of the narrower window at an edge), got {overlap!r}")
    which = torch.zeros(u.shape, dtype=torch.int64, device=u.device)
    if len(partitions) > 1:
        which = torch.randint(len(partitions), u.shape, device=u.device, generator=generator)
    # Row j: the edges of partition j and the ramps at them, padded with zeros.
    depth = max(windows.num_windows for windows in partitions)
    edges, ramps = torch.zeros(2, len(partitions), depth + 1, dtype=torch.float64)
    for row, windows in enumerate(partitions):
        values = torch.tensor(windows.edges, dtype=torch.float64)
        width = values[:-1] - values[1:]
        edges[row, : len(values)] = values
        ramps[row, 1 : len(width)] = overlap * torch.minimum(width[:-1], width[1:])
    edges, ramps = edges.to(u.device)[which], ramps.to(u.device)[which]  # [B, R + 1]
    rows = torch.arange(len(u), device=u.device)
    index = torch.stack([windows.lookup(u) for windows in partitions])[which, rows]
    if overlap > 0:
        index = _draw_neighbour(u, index, edges, ramps, generator)
    u_edge, ramp_start, ramp_end = edges[rows, index], ramps[rows, index], ramps[rows, index + 1]
    u_start, u_end = u_edge + ramp_start, edges[rows, index + 1] - ramp_end
    route = edges.T.scatter(0, index[None], u_start[None])
    return PlacedWindows(index, u_edge, u_start, u_end, ramp_start, ramp_end, route)


def _draw_neighbour(u: Tensor, index: Tensor, edges: Tensor, ramps: Tensor, generator: torch.Generator | None) -> Tensor:
    """The window of each time or, within a ramp, the one across the edge with that one's weight there."""
    rows = torch.arange(len(u), device=u.device)
    drawn = torch.rand(u.shape, dtype=u.dtype, device=u.device, generator=generator)
    # At distance s from an edge with ramp d the window across it has weight (1 - s / d) / 2: drawn < that, times 2 d.
    above, below = edges[rows, index] - u, u - edges[rows, index + 1]
    ramp_above, ramp_below = ramps[rows, index], ramps[rows, index + 1]
    up = 2 * ramp_above * drawn < ramp_above - above
    down = 2 * ramp_below * drawn < ramp_below - below
    return index - up.long() + (down & ~up).long()
