"""Any number of steps from one student: where steps beyond one a window, or steps left out, change the error most."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from opensora_perflow.checks import check_num_steps
from opensora_perflow.conventions import expand_like
from opensora_perflow.method.grids import sampling_grid
from opensora_perflow.method.metrics import endpoint_error
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.planning.probe import Probe


@dataclass(frozen=True)
class MeasuredGrid:
    """N + 1 untransformed times and the endpoint error of sampling on them."""

    grid: tuple[float, ...]
    error: float


@torch.no_grad()
def grids_by_steps(
    probe: Probe,
    endpoints: Tensor,
    edges: Sequence[float],
    max_steps: int,
    *,
    places: Sequence[float] = (0.25, 0.5, 0.75),
    progress: bool = False,
) -> dict[int, MeasuredGrid]:
    """Grids for 1..max_steps steps, grown from the window edges by what each change does to the measured error.

    Upwards, the next grid is the last one with one more time: of all intervals and all `places` in them, that of the lowest
    endpoint error. Downwards, one edge less: the one whose absence costs least. Where the default grid (schedule.sampling_grid)
    of as many steps is better, that one, and growth goes on from it. Greedy: a student inside its windows is not the solution
    of any ODE whose local errors could be added up. Measured: it is the sampler itself that runs.

    Args:
        probe: The student as it is sampled, and noise.
        endpoints: Where the teacher's fine steps carry that noise, like it.
        edges: The student's window edges, K + 1 descending times from 1 to 0.
        max_steps: >= 1.
        places: Fractions of an interval at which a time may be put, each in (0, 1).

    Returns:
        Steps -> grid and error. Field calls: below len(places) max_steps^3 / 6 + K^3 / 6, each with all samples.

    Raises:
        ValueError: max_steps not an integer >= 1.
    """
    check_num_steps(max_steps, "the largest number of steps")
    windows = TimeWindows(tuple(edges))

    def measure(grid: tuple[float, ...]) -> MeasuredGrid:
        return MeasuredGrid(grid, endpoint_error(probe.sample(grid), endpoints))

    def best(grids: Iterable[MeasuredGrid], steps: int) -> MeasuredGrid:
        return min([*grids, measure(sampling_grid(windows, steps))], key=lambda measured: measured.error)

    count = windows.num_windows
    measured = {count: measure(windows.edges)}
    for steps in range(count - 1, 0, -1):
        longer = measured[steps + 1].grid
        measured[steps] = best((measure(longer[:k] + longer[k + 1 :]) for k in range(1, steps + 1)), steps)
    for steps in tqdm(range(count + 1, max_steps + 1), desc="placing steps", unit="step", disable=not progress):
        measured[steps] = best(_insertions(probe, endpoints, measured[steps - 1].grid, places), steps)
    return {steps: measured[steps] for steps in sorted(measured) if steps <= max_steps}


def _insertions(probe: Probe, endpoints: Tensor, grid: tuple[float, ...], places: Sequence[float]) -> list[MeasuredGrid]:
    """The grid with one more time, for every interval and place. What lies before the new time is computed once."""
    results, x = [], probe.noise
    for k, (start, end) in enumerate(zip(grid, grid[1:])):
        t, t_next = probe.flow_times(grid[k : k + 2])
        v = probe.velocity(x, t)
        for place in places:
            time = start + (end - start) * place
            (t_new,) = probe.flow_times([time])
            landed = x + expand_like(t_new - t, x) * v
            rest = Probe(probe.velocity, landed, probe.ratio).sample((time, *grid[k + 1 :]))
            results.append(MeasuredGrid((*grid[: k + 1], time, *grid[k + 1 :]), endpoint_error(rest, endpoints)))
        x = x + expand_like(t_next - t, x) * v
    return results
