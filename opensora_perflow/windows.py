"""Time windows: edges, and which window a time lies in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class TimeWindows:
    """K windows of untransformed time, cut at K + 1 edges that descend from 1 (noise) to 0 (data).

    Window k is the half-open interval (edges[k + 1], edges[k]]; t = 0 belongs to the last one. Window 0 is the noisiest.

    Raises:
        ValueError: edges that are not finite numbers, do not descend strictly, or do not run from 1 to 0.

    Source: PeRFlow (arXiv:2405.07510), section 3: the time windows of the piecewise flow.
    """

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(edge, Real) and not isinstance(edge, bool) and math.isfinite(edge) for edge in self.edges):
            raise ValueError(f"window edges must be finite numbers, got {list(self.edges)}; write for example [1, 0.6, 0]")
        edges = tuple(float(edge) for edge in self.edges)
        descending = all(start > end for start, end in zip(edges, edges[1:]))
        if len(edges) < 2 or edges[0] != 1.0 or edges[-1] != 0.0 or not descending:
            raise ValueError(
                f"window edges must descend strictly from 1 to 0, got {list(self.edges)}; "
                "write for example [1, 0.75, 0.5, 0.25, 0], or the number of windows alone"
            )
        object.__setattr__(self, "edges", edges)

    @classmethod
    def uniform(cls, num_windows: int) -> TimeWindows:
        """K windows of equal width in untransformed time.

        Raises:
            ValueError: num_windows is not an integer >= 1.
        """
        if isinstance(num_windows, bool) or not isinstance(num_windows, int) or num_windows < 1:
            raise ValueError(f"the number of windows must be an integer >= 1, got {num_windows!r}; write windows=4")
        return cls(tuple(1.0 - k / num_windows for k in range(num_windows)) + (0.0,))

    @classmethod
    def from_config(cls, value: int | Sequence[float] | TimeWindows) -> TimeWindows:
        """Windows as configs write them: a number of uniform windows, or the list of edges.

        Raises:
            ValueError: anything else, or invalid edges.
        """
        if isinstance(value, TimeWindows):
            return value
        if isinstance(value, int):
            return cls.uniform(value)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return cls(tuple(value))
        raise ValueError(
            f"windows must be a number of windows (4) or a descending list of edges ([1, 0.6, 0.2, 0]), got {value!r}"
        )

    @property
    def num_windows(self) -> int:
        return len(self.edges) - 1

    def lookup(self, u: Tensor) -> Tensor:
        """Index of the window that each time lies in.

        Args:
            u: Untransformed times in [0, 1], any shape. Compared in float64: a time that was rounded to a lower precision
                before (bfloat16 makes 0.749 to 0.75) is looked up as what it was rounded to.

        Returns:
            int64 indices, shaped like `u`; 0 is the noisiest window.

        Raises:
            ValueError: a time outside [0, 1], or NaN.
        """
        u = u.to(torch.float64)
        if not bool(((u >= 0.0) & (u <= 1.0)).all()):
            raise ValueError(f"times must lie in [0, 1], got {u.min().item():.6g} to {u.max().item():.6g}")
        inner = torch.tensor(self.edges[-2:0:-1], dtype=torch.float64, device=u.device)  # ascending, without 0 and 1
        return self.num_windows - 1 - torch.searchsorted(inner, u.contiguous(), right=False)

    def bounds(self, window_idx: Tensor) -> tuple[Tensor, Tensor]:
        """(u_start, u_end) of each window index, float64, u_start > u_end: the noisy and the clean edge."""
        edges = torch.tensor(self.edges, dtype=torch.float64, device=window_idx.device)
        return edges[window_idx], edges[window_idx + 1]
