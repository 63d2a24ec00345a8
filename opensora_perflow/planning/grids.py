"""A better grid for the steps of a network as it is, without training."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from opensora_perflow.conventions import expand_like
from opensora_perflow.method.metrics import endpoint_error
from opensora_perflow.planning.fine_path import FinePath, step_errors, uniform_grid
from opensora_perflow.planning.probe import Probe
from opensora_perflow.planning.shortest_path import shortest_path


@torch.no_grad()
def carried_grid(probe: Probe, path: FinePath, num_steps: int, *, progress: bool = False) -> tuple[tuple[int, ...], float]:
    """The grid whose Euler steps stay nearest to the fine path, by dynamic programming over real states.

    For each number of steps n and candidate j the best way there is kept, as the state that its steps reach. Best is nearest to
    x(t_j). So errors are carried on, amplified, damped and cancelled as the field does it, which sums of local errors cannot
    know. The price: a way that is worse at j and would be better at the end is not found.

    Args:
        path: Fine path of the same probe, with M intervals.
        num_steps: N in 1..M. Field calls: (N - 1) (M - N + 1) + 1.

    Returns:
        (N + 1 ascending candidate indices from 0 to M, the true error of this grid on these samples: the last state's distance
        from the path's endpoints).

    Raises:
        ValueError: num_steps out of range.
    """
    last = len(path.times) - 1
    if not 1 <= num_steps <= last:
        raise ValueError(f"{last} intervals between candidate times allow 1 to {last} steps, got {num_steps}")
    ways: dict[int, tuple[Tensor, tuple[int, ...], float]] = {0: (probe.noise, (0,), 0.0)}
    for n in tqdm(range(1, num_steps + 1), desc=f"planning {num_steps} steps", unit="step", disable=not progress):
        arrivals: dict[int, tuple[Tensor, tuple[int, ...], float]] = {}
        targets = range(n, last - num_steps + n + 1) if n < num_steps else [last]
        for i, (x, indices, _) in ways.items():
            v = probe.velocity(x, path.flow_times[i])
            for j in targets:
                if j > i:
                    landed = x + expand_like(path.flow_times[j] - path.flow_times[i], x) * v
                    error = endpoint_error(landed, path.states[j])
                    if j not in arrivals or error < arrivals[j][2]:
                        arrivals[j] = (landed, (*indices, j), error)
        ways = arrivals
    _, indices, error = ways[last]
    return indices, error


@dataclass(frozen=True)
class Comparison:
    """A grid against uniform steps on noise that it was not chosen with."""

    grid: tuple[float, ...]
    predicted: float
    """Its error on the noise that it was chosen with."""
    error: float
    uniform: float
    """Error of as many uniform steps, same noise."""
    gain: float
    """Mean of uniform minus planned squared error over the samples, in standard errors of that mean: above 2 is no accident."""

    @property
    def better(self) -> bool:
        return self.error < self.uniform


def choose_grid(probe: Probe, path: FinePath, num_steps: int, *, progress: bool = False) -> tuple[tuple[float, ...], float]:
    """The best of three grids on the path's own noise.

    The shortest path of squared local errors (`step_errors`: exact, but blind to what becomes of an error), `carried_grid`, and
    uniform steps; all are sampled.

    Returns:
        (num_steps + 1 times, the endpoint error there).

    Raises:
        ValueError: num_steps out of 1..M.
    """
    local, _ = shortest_path(step_errors(path).square(), num_steps)
    carried, _ = carried_grid(probe, path, num_steps, progress=progress)
    grids = [tuple(path.times[list(indices)].tolist()) for indices in (local, carried)] + [uniform_grid(num_steps)]
    error, grid = min((endpoint_error(probe.sample(grid), path.endpoints), grid) for grid in grids)
    return grid, error


def compare(grid: tuple[float, ...], predicted: float, fresh: Probe, endpoints: Tensor) -> Comparison:
    """Sample fresh noise on a grid and on as many uniform steps."""
    planned, uniform = fresh.sample(grid), fresh.sample(uniform_grid(len(grid) - 1))
    squares = [(x - endpoints).float().square().flatten(1).mean(dim=1).double() for x in (uniform, planned)]
    saved = squares[0] - squares[1]
    spread = saved.std().item() / len(saved) ** 0.5 if len(saved) > 1 else float("nan")
    gain = saved.mean().item() / spread if spread > 0 else 0.0
    return Comparison(grid, predicted, endpoint_error(planned, endpoints), endpoint_error(uniform, endpoints), gain)
