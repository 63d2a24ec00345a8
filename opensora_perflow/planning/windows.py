r"""Windows that a student finds equally hard, from the errors that a pilot student made in its own.

The teacher alone does not tell where a student will err: its curvature, or the error of its Euler steps, is largest where its
path bends, but a bend that is the same for all samples is learnt in no time, and a straight piece on which samples decide for
different modes is not (benchmarks/README.md has the numbers). So a student is asked: a short run with any windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from opensora_perflow.metrics import endpoint_error
from opensora_perflow.planning.fine_path import FinePath, uniform_grid
from opensora_perflow.planning.probe import Probe
from opensora_perflow.planning.shortest_path import shortest_path
from opensora_perflow.solvers import euler_step

POWER = 1.5
"""How a student's error grows with the width of its window: 1 for a velocity that is wrong by as much everywhere, 2 for a bend
that nobody learnt. Measured on the mixture: 1.1 to 1.8."""


@torch.no_grad()
def window_errors(student: Probe, path: FinePath) -> list[float]:
    """Root mean square error of one step of the student across each window, from the teacher's own state at its noisy edge.

    Args:
        student: As it is sampled; its noise is not used.
        path: The teacher's, at the student's window edges.
    """
    landed = (
        euler_step(student.velocity, x, t, t_next) for x, t, t_next in zip(path.states, path.flow_times, path.flow_times[1:])
    )
    return [endpoint_error(x, state) for x, state in zip(landed, path.states[1:])]


def plan_windows(
    edges: Sequence[float], errors: Sequence[float], num_windows: int, *, power: float = POWER, resolution: int = 64
) -> tuple[tuple[float, ...], list[float]]:
    r"""Edges with the least sum of squared errors, if errors follow the pilot's.

    The pilot's error in window k stands for a density of difficulty, rho = e_k^{1/p} / width there, and a window (s, e] is
    expected to err by (\int_e^s rho du)^p. Since 2 p > 1 the best windows all hold the same difficulty. The steps between
    candidates are exact by dynamic programming (shortest_path).

    Args:
        edges: The pilot's, K + 1 descending times from 1 to 0.
        errors: Its K window errors, > 0.
        num_windows: How many are planned, >= 1; need not be K.
        power: p.
        resolution: Edges are multiples of 1 / resolution, which is at least num_windows.

    Returns:
        (num_windows + 1 edges, the expected error of each window).

    Raises:
        ValueError: errors that are not positive, or not one a window; more windows than `resolution`.
    """
    if len(errors) != len(edges) - 1 or not all(math.isfinite(error) and error > 0 for error in errors):
        raise ValueError(
            f"planning needs a positive error for each of the pilot's {len(edges) - 1} windows, got {list(errors)}"
        )
    times = uniform_grid(resolution)
    nodes = torch.tensor(edges, dtype=torch.float64)
    density = torch.tensor(errors, dtype=torch.float64) ** (1 / power) / (nodes[:-1] - nodes[1:])
    u = torch.tensor(times, dtype=torch.float64)[:, None]
    # Difficulty above each candidate: what it holds of every window of the pilot, times the density there.
    above = ((nodes[:-1] - torch.maximum(u, nodes[1:])).clamp(min=0) * density).sum(dim=1)
    expected = (above[None] - above[:, None]).clamp(min=0) ** power
    indices, _ = shortest_path(expected.square(), num_windows)
    return tuple(times[i] for i in indices), [expected[i, j].item() for i, j in zip(indices, indices[1:])]
