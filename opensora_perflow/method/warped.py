"""Windows as each sample of a batch meets them: cut in untransformed time, warped by the sample's own ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opensora_perflow.conventions import shift_grid
from opensora_perflow.method.windows import TimeWindows


@dataclass(frozen=True)
class WarpedWindows:
    """The one place that knows which window a flow time lies in, for this sample.

    Args:
        windows: Edges in untransformed time.
        batch_size: B.
        ratio: Warp of each sample's time, [B], float64, see `conventions.shift_time`; None: no warp.
        device: Of the edges where there is no ratio.
    """

    windows: TimeWindows
    batch_size: int
    ratio: Tensor | None = None
    device: torch.device | str = "cpu"

    def take(self, rows: Tensor) -> WarpedWindows:
        """The windows of some of the samples."""
        return replace(self, batch_size=len(rows), ratio=None if self.ratio is None else self.ratio[rows])

    def times(self, grid: Sequence[float]) -> Tensor:
        """Untransformed times [n] -> flow times of each sample, [n, B], float64."""
        return shift_grid(torch.tensor(grid, dtype=torch.float64, device=self.device), self.batch_size, self.ratio)

    @property
    def edges(self) -> Tensor:
        """Flow times of the edges, [K + 1, B], float64, descending from 1 to 0."""
        return self.times(self.windows.edges)

    def lookup(self, t: Tensor) -> Tensor:
        """Index [B] of the window (t_end, t_start] that each flow time t [B] lies in; t = 0 belongs to the last one.

        Times are compared with the warped edges themselves, so an edge of a sample is found in its window to the last bit. An
        edge that was warped back to untransformed time is not.

        Raises:
            ValueError: a time outside [0, 1], or NaN.
        """
        if not bool(((t >= 0.0) & (t <= 1.0)).all()):
            raise ValueError(f"times must lie in [0, 1], got {t.min().item():.6g} to {t.max().item():.6g}")
        return (self.edges[:-1] >= t).sum(dim=0) - 1

    def bounds(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy and clean edge (t_start, t_end), [B] each, of the window that each flow time t [B] lies in."""
        edges, index = self.edges, self.lookup(t)[None]
        return edges.gather(0, index)[0], edges.gather(0, index + 1)[0]
