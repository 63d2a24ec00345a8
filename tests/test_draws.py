import pytest
import torch

from opensora_perflow.method.draws import draw, fill_evenly, mix_in_edge
from opensora_perflow.method.grids import linear_grid, sampling_grid
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.method.windows import TimeWindows

F64 = torch.float64


@pytest.mark.parametrize("steps", [4, 8, 28, 32])
def test_grid_is_the_hosts_when_windows_divide_it(steps):
    host = [1 - i / steps for i in range(steps)] + [0.0]
    assert sampling_grid(TimeWindows.uniform(4), steps) == pytest.approx(host, abs=1e-15)
    assert sampling_grid(TimeWindows.uniform(1), 30) == pytest.approx([1 - i / 30 for i in range(31)], abs=1e-15)


@pytest.mark.parametrize("steps", range(3, 17))
def test_grid_holds_every_edge_and_extra_steps_go_to_the_noise(steps):
    windows = TimeWindows((1.0, 0.9, 0.3, 0.0))
    grid = sampling_grid(windows, steps)
    assert len(grid) == steps + 1 and set(windows.edges) <= set(grid)
    assert all(a > b for a, b in zip(grid, grid[1:]))
    per_window = windows.lookup(torch.tensor(grid[:-1], dtype=torch.float64)).bincount().tolist()
    assert max(per_window) - min(per_window) <= 1 and per_window == sorted(per_window, reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_fewer_steps_than_windows_span_whole_windows(steps):
    windows = TimeWindows.uniform(4)
    grid = sampling_grid(windows, steps)
    assert len(grid) == steps + 1 and set(grid) <= set(windows.edges)
    assert grid[0] == 1 and grid[-1] == 0 and all(a > b for a, b in zip(grid, grid[1:]))


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "4"])
def test_step_counts_below_one_are_refused(steps):
    with pytest.raises(ValueError, match="number of steps must be an integer >= 1"):
        sampling_grid(TimeWindows.uniform(4), steps)


def test_linear_grid_has_exact_ends():
    start, end = torch.tensor([[1.0, 0.3], [0.7, 0.1]], dtype=torch.float64)
    grid = linear_grid(start, end, 7)
    assert torch.equal(grid[0], start) and torch.equal(grid[-1], end)
    torch.testing.assert_close(grid.diff(dim=0), ((end - start) / 7).expand(7, 2), atol=1e-15, rtol=0)


@pytest.mark.parametrize("mass", [0.0, 0.3, 1.0])
def test_one_time_moves_to_the_edge_with_its_share(mass):
    t_start = torch.full((20_000,), 0.75, dtype=torch.float64)
    times, weights = mix_in_edge(0.5 + 0.2 * torch.rand(1, 20_000, dtype=torch.float64), t_start, mass)
    share = (times == 0.75).double().mean().item()
    assert abs(share - mass) < 5 * (mass * (1 - mass) / 20_000) ** 0.5 + 1e-12  # five standard errors
    assert (weights == 1).all()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("mass", [0.0, 0.3, 0.75])
def test_several_times_weigh_the_edge_with_its_share(count, mass):
    t_start = torch.tensor([1.0, 0.75], dtype=torch.float64)
    times = torch.rand(count, 2, dtype=torch.float64) * 0.5
    before = times.clone()
    mixed, weights = mix_in_edge(times, t_start, mass)
    at_edge = mixed == t_start
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close((weights * at_edge).sum(dim=0), torch.full((2,), mass, dtype=torch.float64))
    assert at_edge.sum(dim=0).tolist() == [int(mass > 0)] * 2  # no pair is evaluated twice at the same point
    assert torch.equal(times, before)


def test_filling_maps_windows_onto_windows():
    windows = TimeWindows((1.0, 0.9, 0.6, 0.5, 0.0))
    u = torch.tensor([1.0, 0.875, 0.75, 0.625, 0.5, 0.25, 0.125, 0.0], dtype=F64)
    expected = torch.tensor([1.0, 0.95, 0.9, 0.75, 0.6, 0.5, 0.25, 0.0], dtype=F64)
    torch.testing.assert_close(fill_evenly(u, windows), expected, rtol=0, atol=1e-15)  # a few operations in float64
    drawn = torch.rand(1000, dtype=F64)
    assert torch.equal(windows.lookup(fill_evenly(drawn, windows)), TimeWindows.uniform(4).lookup(drawn))
    assert torch.equal(fill_evenly(drawn, TimeWindows.uniform(4)), drawn)


def test_windows_are_drawn_by_their_shares():
    windows = TimeWindows((1.0, 0.9, 0.5, 0.0))
    # Shares 1 : 2 : 5 are intervals of u from 1, 7/8 and 5/8 down; the middle of each is the middle of its window.
    u = torch.tensor([1.0, 15 / 16, 7 / 8, 6 / 8, 5 / 8, 5 / 16, 0.0], dtype=F64)
    expected = torch.tensor([1.0, 0.95, 0.9, 0.7, 0.5, 0.25, 0.0], dtype=F64)
    torch.testing.assert_close(fill_evenly(u, windows, (1, 2, 5)), expected, rtol=0, atol=1e-15)
    uniform = TimeWindows.uniform(4)
    evenly = torch.linspace(1, 0, 6400, dtype=F64)
    drawn = draw(WarpedWindows(uniform, 6400, None, "cpu"), solver_steps=1, given=evenly, shares=(1, 2, 3, 2))
    assert drawn.window_idx.bincount().tolist() == [800, 1600, 2400, 1600]
