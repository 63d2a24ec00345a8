"""Time windows: edges, and which window a time lies in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opensora_perflow.checks import MOST_STEPS, MOST_WINDOWS, as_number, is_list, shown, whole

LEAST_WIDTH = 1e-6
"""Of a window and of a sampling step: velocities divide by it, in float32."""


@dataclass(frozen=True)
class TimeWindows:
    """K windows of untransformed time, cut at K + 1 edges that descend from 1 (noise) to 0 (data).

    Window k is the half-open interval (edges[k + 1], edges[k]]; t = 0 belongs to the last one. Window 0 is the noisiest.

    Args:
        edges: K + 1 times.
        grids: Sampling grids that a plan chose, at most one for each number of steps; N + 1 times from 1 to 0 for N steps.

    Raises:
        ValueError: edges or grids that are not finite numbers, do not descend strictly (by LEAST_WIDTH), or do not run from 1
            to 0. Two grids of as many steps. More than MOST_WINDOWS windows or MOST_STEPS steps.

    Source: PeRFlow (arXiv:2405.07510), section 3: the time windows of the piecewise flow.
    """

    edges: tuple[float, ...]
    grids: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "edges", _descending(self.edges, "window edges", MOST_WINDOWS, ", or the number of windows alone")
        )
        grids = tuple(_descending(grid, "a plan's sampling grid", MOST_STEPS) for grid in self.grids)
        if len({len(grid) for grid in grids}) < len(grids):
            raise ValueError(f"a plan holds one grid for a number of steps, got {sorted(len(g) - 1 for g in grids)} steps")
        object.__setattr__(self, "grids", grids)

    @classmethod
    def uniform(cls, num_windows: int) -> TimeWindows:
        """K windows of equal width in untransformed time.

        Raises:
            ValueError: num_windows is not an integer from 1 to MOST_WINDOWS.
        """
        num_windows = whole(high=MOST_WINDOWS, remedy="; write windows=4")("the number of windows", num_windows)
        return cls(tuple(1.0 - k / num_windows for k in range(num_windows)) + (0.0,))

    @cached_property
    def is_uniform(self) -> bool:
        return self.edges == TimeWindows.uniform(self.num_windows).edges

    @cached_property
    def num_windows(self) -> int:
        return len(self.edges) - 1

    def rounded(self, num_levels: int) -> TimeWindows:
        """The same windows with their edges at whole multiples of 1 / num_levels, where a sampler in whole timesteps steps.

        Raises:
            ValueError: two edges fall together.
        """
        return TimeWindows(tuple(round(edge * num_levels) / num_levels for edge in self.edges), self.grids)

    def grid_of(self, num_steps: int) -> tuple[float, ...] | None:
        """The plan's sampling grid for a number of steps, if it has one."""
        return next((grid for grid in self.grids if len(grid) == num_steps + 1), None)

    def lookup(self, u: Tensor) -> Tensor:
        """Index of the window that each time lies in.

        Args:
            u: Untransformed times in [0, 1], any shape. Compared in float64. A time that was rounded before (bfloat16 makes
                0.749 to 0.75) is looked up as what it was rounded to.

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


def _descending(times: Sequence[float], name: str, most: int, alternative: str = "") -> tuple[float, ...]:
    """The times as floats; raises ValueError unless they descend strictly from 1 to 0."""
    if not is_list(times) or len(times) > most + 1:
        raise ValueError(f"{name} must be a list of at most {most + 1} times, got {shown(times)}; write [1, 0.6, 0]")
    values = tuple(as_number(time) for time in times)
    if not all(value is not None and abs(value) < math.inf for value in values):
        raise ValueError(f"{name} must be finite numbers, got {shown(list(times))}; write for example [1, 0.6, 0]")
    descending = all(start > end for start, end in zip(values, values[1:]))
    if len(values) < 2 or values[0] != 1.0 or values[-1] != 0.0 or not descending:
        raise ValueError(
            f"{name} must descend strictly from 1 to 0, got {shown(list(times))}; "
            f"write for example [1, 0.75, 0.5, 0.25, 0]{alternative}"
        )
    if any(start - end < LEAST_WIDTH for start, end in zip(values, values[1:])):
        raise ValueError(f"{name} must lie at least {LEAST_WIDTH:g} apart, got {shown(list(times))}; leave one of them out")
    return tuple(map(float, values))
