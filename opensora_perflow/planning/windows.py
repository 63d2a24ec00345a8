r"""Windows for a student, from what a pilot student's windows add to its error.

The teacher alone does not tell where a student will err. The teacher's curvature, and the error of its Euler steps, are largest
where its path bends. But a bend that is the same for all samples is learnt in no time. A straight piece on which samples decide
for different modes is not. So a student is asked: a short run with any windows.
"""

import math
from collections.abc import Sequence

import torch

from opensora_perflow.method.metrics import endpoint_error
from opensora_perflow.method.solvers import euler_step, solve
from opensora_perflow.planning.fine_path import FinePath, uniform_grid
from opensora_perflow.planning.probe import Probe
from opensora_perflow.planning.shortest_path import shortest_path

POWER = 1.5
"""How a student's error grows with the width of its window. 1: a velocity that is wrong by as much everywhere. 2: a bend that
nobody learnt. Measured on the mixture: 1.1 to 1.8."""


@torch.no_grad()
def local_errors(student: Probe, path: FinePath) -> list[float]:
    """Root mean square error of one step of the student across each window, from the teacher's own state at its noisy edge.

    Args:
        student: As it is sampled; its noise is not used.
        path: The teacher's, at the student's window edges.
    """
    ends = zip(path.states, path.flow_times, path.flow_times[1:], path.states[1:])
    return [endpoint_error(euler_step(student.velocity, x, t, t_next), end) for x, t, t_next, end in ends]


@torch.no_grad()
def added_errors(student: Probe, path: FinePath) -> list[float]:
    r"""What each window adds to the error at the end, when the student takes one step a window.

    With E_k the endpoint error of a student that starts at window k from the teacher's own state there, window k adds
    sqrt(E_k^2 - E_{k+1}^2). That is its own error, as the windows below amplify or damp it. The squares add up to E_0^2, that
    of sampling from noise.

    Args:
        student, path: As for `local_errors`.

    Returns:
        One number a window, at least a hundredth of E_0: a window whose error the others undo is not free.
    """
    squares = []
    for k in range(len(path.times) - 1):
        landed = solve(student.velocity, path.states[k], path.flow_times[k:])
        squares.append(endpoint_error(landed, path.endpoints) ** 2)
    floor = (0.01 * squares[0] ** 0.5) ** 2
    return [max(square - rest, floor) ** 0.5 for square, rest in zip(squares, [*squares[1:], 0.0])]


CRITERIA = {"added": added_errors, "local": local_errors}
"""What windows may be planned by. Neither wins always (benchmarks/README.md): a second pilot, with each plan, tells."""


RESOLUTION = 64
"""Planned edges are multiples of 1 over this, so it is also the most windows that can be planned."""


def plan_windows(
    edges: Sequence[float], errors: Sequence[float], num_windows: int, *, power: float = POWER, resolution: int = RESOLUTION
) -> tuple[tuple[float, ...], list[float]]:
    r"""Edges with the least sum of squared errors, if errors follow the pilot's.

    The pilot's error in window k stands for a density of difficulty, rho = e_k^{1/p} / width there. A window (s, e] is
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
