r"""Windows that overlap: which of them trains a time. All in untransformed time.

A student of disjoint windows turns at their edges. A step that begins above an edge and ends below follows the window that the
step is leaving. Here a time may belong to several windows, and window k is drawn for it with probability w_k(u), where
sum_k w_k(u) = 1. A squared error is least at the mean of its random target, so the student learns the windows' velocities v_k,
blended:

    v*(x, u) = sum_k pi_k v_k(x, u),     pi_k = w_k(u) p_k(x) / sum_j w_j(u) p_j(x),

with p_k the density at time u of the states on window k's lines. All windows follow one teacher, so the p_k are nearly equal
and pi_k is nearly w_k. Two families of weights, which combine:

overlap  The lines of a window are continued over its noisy edge, by the length d. At s above the edge its weight is 1 - s / d,
         the upper window's is s / d. Steps go down: the nearer to the edge a step begins, the
         more of its length lies below. At the edge itself nothing is blended. A sampler with one step a window evaluates there.
grids    Several partitions of [1, 0], equally often: the student's windows, and the steps of uniform grids that it is to be
         sampled with. At a time where only one of the grids has an edge, that grid's own step can be learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.method.windows import TimeWindows


@dataclass(frozen=True)
class PlacedWindows:
    """One window per sample. All times float64, untransformed."""

    window_idx: Tensor
    """[B], the index in the window's own partition; 0 is the noisiest."""
    u_start: Tensor
    u_end: Tensor
    """[B], the noisy and the clean edge."""
    over_start: Tensor
    over_end: Tensor
    """[B], how far the window's lines are continued above its noisy edge, and the next window's into this one; >= 0."""
    route: Tensor
    """[R + 1, B], the steps of a sampler on its way to the window: route[window_idx] is u_start."""

    def times(self, positions: Tensor) -> Tensor:
        """Places [n, B] in (0, 1], 1 the noisiest and 0 the cleanest -> times of the window.

        Uniform places become times with the density of the window's weight. The weight rises linearly over `over_end` from the
        clean edge, and falls linearly over `over_start` above the noisy one. Without overlap this is linear.
        """
        width, rise, fall = self.u_start - self.u_end, self.over_end, self.over_start
        total = width - rise / 2 + fall / 2
        # Mass below and above a place; a ramp of length d holds d / 2, and its outer part of length s holds s^2 / 2 d.
        below, above = total * positions, total * (1.0 - positions)
        u = self.u_end + (below + rise / 2)
        u = torch.where(below < rise / 2, self.u_end + (2 * rise * below).sqrt(), u)
        return torch.where(above < fall / 2, self.u_start + fall - (2 * fall * above).sqrt(), u)


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
        overlap: d at each inner edge, as a share 0..1 of the window above it.
        generator: Nothing is drawn from it where there is one partition and no overlap.

    Returns:
        PlacedWindows; without overlap, each holds its time.

    Raises:
        ValueError: an overlap outside 0..1 (it would reach over two windows).
    """
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap must lie in 0..1 (a share of the window above an edge), got {overlap!r}")
    which = torch.zeros(u.shape, dtype=torch.int64, device=u.device)
    if len(partitions) > 1:
        which = torch.randint(len(partitions), u.shape, device=u.device, generator=generator)
    # Row j: the edges of partition j and the overlaps above them, padded with zeros.
    depth = max(windows.num_windows for windows in partitions)
    edges, over = torch.zeros(2, len(partitions), depth + 1, dtype=torch.float64)
    for row, windows in enumerate(partitions):
        values = torch.tensor(windows.edges, dtype=torch.float64)
        edges[row, : len(values)] = values
        over[row, 1 : len(values) - 1] = overlap * (values[:-2] - values[1:-1])
    edges, over = edges.to(u.device)[which], over.to(u.device)[which]  # [B, R + 1]
    rows = torch.arange(len(u), device=u.device)
    index = torch.stack([windows.lookup(u) for windows in partitions])[which, rows]
    if overlap > 0:
        drawn = torch.rand(u.shape, dtype=u.dtype, device=u.device, generator=generator)
        above, length = u - edges[rows, index + 1], over[rows, index + 1]
        index = index + (length * drawn < length - above).long()
    route = edges.T
    return PlacedWindows(
        index, edges[rows, index], edges[rows, index + 1], over[rows, index], over[rows, index + 1], route
    )  # fmt: skip
