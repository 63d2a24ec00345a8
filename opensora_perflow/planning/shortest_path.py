"""Dynamic programming over candidate times: the cheapest way from noise to data in a given number of steps."""

import torch
from torch import Tensor


def shortest_path(cost: Tensor, num_steps: int) -> tuple[tuple[int, ...], float]:
    r"""The exact minimum of the sum of cost[i, j] over the steps i -> j of a grid.

    best_n(j) = min_{i < j} best_{n-1}(i) + cost[i, j]: Bellman's recursion over the number of steps n.

    Args:
        cost: [M + 1, M + 1]; cost[i, j] is that of one step from candidate i to candidate j > i, other entries are not read.
            Infinity forbids a step.
        num_steps: N in 1..M.

    Returns:
        (N + 1 ascending candidate indices from 0 to M, their total cost).

    Raises:
        ValueError: num_steps out of range, costs that are not a number, or every grid of so many steps holds a forbidden step.
    """
    last = len(cost) - 1
    if not 1 <= num_steps <= last:
        raise ValueError(f"{last} intervals between candidate times allow 1 to {last} steps, got {num_steps}")
    cost = cost.to("cpu", torch.float64)
    if bool(cost.triu(1).isnan().any()):
        raise ValueError("a step's cost is not a number; check that the network's outputs are finite")
    ahead = torch.ones_like(cost, dtype=torch.bool).triu(1)
    cost = torch.where(ahead, cost, torch.inf)
    best = torch.full((last + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    came_from = []
    for _ in range(num_steps):
        best, arrival = (best[:, None] + cost).min(dim=0)
        came_from.append(arrival)
    if not bool(best[last].isfinite()):
        raise ValueError(f"no grid of {num_steps} steps avoids the forbidden ones")
    indices = [last]
    for arrival in reversed(came_from):
        indices.append(int(arrival[indices[-1]]))
    return tuple(reversed(indices)), best[last].item()
