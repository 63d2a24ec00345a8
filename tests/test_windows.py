import random

import pytest
import torch

from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.training.plan_file import windows_of


def random_edges(seed):
    generator = random.Random(seed)
    return (1.0, *sorted((generator.random() for _ in range(seed)), reverse=True), 0.0)


EDGES = [random_edges(seed) for seed in range(6)]


def test_uniform_equals_the_list():
    assert TimeWindows.uniform(4) == windows_of([1, 0.75, 0.5, 0.25, 0]) == windows_of(4)
    assert TimeWindows.uniform(3).num_windows == 3


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_time_lies_in_exactly_one_window(edges, dtype):
    windows = TimeWindows(edges)
    u = torch.cat([torch.rand(1000, dtype=dtype), torch.tensor([0.0, 1.0], dtype=dtype)])
    start, end = windows.bounds(windows.lookup(u))
    inside = (u.double() <= start) & (u.double() > end)
    assert (inside | (u == 0)).all()
    members = sum((u.double() <= a) & (u.double() > b) for a, b in zip(edges, edges[1:]))
    assert (members[u > 0] == 1).all()


@pytest.mark.parametrize("edges", EDGES)
def test_edges_belong_to_the_window_below_and_midpoints_to_their_own(edges):
    windows = TimeWindows(edges)
    e = torch.tensor(edges, dtype=torch.float64)
    indices = list(range(windows.num_windows))
    assert windows.lookup((e[:-1] + e[1:]) / 2).tolist() == indices
    assert windows.lookup(e[:-1]).tolist() == indices  # the noisy edge is part of the window
    assert windows.lookup(torch.zeros(1)).tolist() == [windows.num_windows - 1]


def test_times_are_compared_before_any_rounding():
    windows = TimeWindows.uniform(4)
    assert windows.lookup(torch.tensor([0.7501, 0.7499], dtype=torch.float64)).tolist() == [0, 1]
    # In bfloat16 both are 0.75: looked up as what they were rounded to.
    assert windows.lookup(torch.tensor([0.7501, 0.7499], dtype=torch.bfloat16)).tolist() == [1, 1]


def test_times_near_zero_have_a_window():
    # The public PeRFlow code raises IndexError at t <= 1e-4.
    assert TimeWindows.uniform(4).lookup(torch.tensor([1e-4, 1e-9, 0.0])).tolist() == [3, 3, 3]


@pytest.mark.parametrize("edges", [[1.0, 0.4, 0.6, 0], [0.9, 0.5, 0], [1, 0.5, 0.1], [1, 0.5, 0.5, 0], [1], []])
def test_wrong_edges_are_refused(edges):
    with pytest.raises(ValueError, match="must descend strictly from 1 to 0, got"):
        windows_of(edges)


@pytest.mark.parametrize("edges", [[1, float("nan"), 0], [1, "x", 0], [1, True, 0]])
def test_edges_that_are_no_numbers_are_refused(edges):
    with pytest.raises(ValueError, match="must be finite numbers"):
        windows_of(edges)


@pytest.mark.parametrize("count", [0, -2, True])
def test_fewer_than_one_window_is_refused(count):
    with pytest.raises(ValueError, match="integer >= 1"):
        windows_of(count)


@pytest.mark.parametrize("value", ["4", 2.0, None, {"edges": []}])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="windows must be a number of windows"):
        windows_of(value)


@pytest.mark.parametrize("time", [-0.1, 1.5, float("nan")])
def test_times_outside_are_refused(time):
    with pytest.raises(ValueError, match="times must lie in"):
        TimeWindows.uniform(2).lookup(torch.tensor([0.5, time]))
