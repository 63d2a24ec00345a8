"""Windows of warped time: to the last bit what each sample's edges say, and untransformed time's own where there is no warp."""

import pytest
import torch

from opensora_perflow.conventions import shift_time, unshift_time
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.method.windows import TimeWindows

F64 = torch.float64
BATCH = 200


def random_windows(seed):
    generator = torch.Generator().manual_seed(seed)
    inner = torch.rand(1 + seed % 9, dtype=F64, generator=generator).sort(descending=True).values
    return TimeWindows((1.0, *inner.tolist(), 0.0))


def random_warp(seed):
    """Ratios from 1/30 to 30, evenly in their logarithm: images of 144p have 0.3, long videos of 720p some 20."""
    generator = torch.Generator().manual_seed(seed)
    ratio = 30.0 ** (2 * torch.rand(BATCH, dtype=F64, generator=generator) - 1)
    return WarpedWindows(random_windows(seed), BATCH, ratio)


@pytest.mark.parametrize("seed", range(20))
def test_every_warped_edge_lies_in_the_window_that_it_begins(seed):
    """Exactly, and the next number above it in the window before."""
    warped = random_warp(seed)
    edges = warped.edges
    assert edges.shape == (warped.windows.num_windows + 1, BATCH) and edges.dtype == F64
    assert (edges[0] == 1).all() and (edges[-1] == 0).all() and (edges.diff(dim=0) < 0).all()
    for k, edge in enumerate(edges[:-1]):
        assert (warped.lookup(edge) == k).all()
        assert k == 0 or (warped.lookup(torch.nextafter(edge, torch.ones_like(edge))) == k - 1).all()
        assert (warped.lookup(torch.nextafter(edge, torch.zeros_like(edge))) == k).all()
        middle = (edge + edges[k + 1]) / 2
        assert (warped.lookup(middle) == k).all()
        start, end = warped.bounds(middle)
        assert torch.equal(start, edge) and torch.equal(end, edges[k + 1])
    assert (warped.lookup(torch.zeros(BATCH, dtype=F64)) == warped.windows.num_windows - 1).all()


def test_an_edge_that_was_warped_back_may_miss_its_window():
    """Why times are compared with the warped edges: the way back rounds, here over an edge."""
    missed = 0
    for seed in range(20):
        warped = random_warp(seed)
        for k, edge in enumerate(warped.edges[:-1]):
            missed += int((warped.windows.lookup(unshift_time(edge, warped.ratio)) != k).sum())
    assert missed > 0


@pytest.mark.parametrize("seed", range(5))
def test_each_time_lies_between_its_bounds_in_the_window_of_its_untransformed_time(seed):
    warped = random_warp(seed)
    u = torch.rand(BATCH, dtype=F64, generator=torch.Generator().manual_seed(100 + seed))
    t = shift_time(u, warped.ratio)
    start, end = warped.bounds(t)
    assert ((end < t) & (t <= start)).all()
    # The warp ascends, so it keeps the order; a random time is no edge.
    assert torch.equal(warped.lookup(t), warped.windows.lookup(u))


@pytest.mark.parametrize("seed", range(5))
def test_without_a_warp_windows_are_those_of_untransformed_time(seed):
    windows = random_windows(seed)
    t = torch.rand(BATCH, dtype=F64, generator=torch.Generator().manual_seed(seed))
    t = torch.cat([t, torch.tensor(windows.edges, dtype=F64)])
    warped = WarpedWindows(windows, len(t))
    window_idx = windows.lookup(t)
    assert torch.equal(warped.lookup(t), window_idx)
    for found, expected in zip(warped.bounds(t), windows.bounds(window_idx)):
        assert torch.equal(found, expected)
    assert torch.equal(warped.edges, torch.tensor(windows.edges, dtype=F64)[:, None].expand(-1, len(t)))


def test_times_are_those_of_each_sample():
    warped = WarpedWindows(TimeWindows.uniform(2), 2, torch.tensor([1.0, 3.0], dtype=F64))
    # r u / (1 + (r - 1) u): for r = 3, a half becomes 1.5 / 2 and a quarter 0.75 / 1.5.
    expected = torch.tensor([[1.0, 1.0], [0.5, 0.75], [0.25, 0.5], [0.0, 0.0]], dtype=F64)
    torch.testing.assert_close(warped.times((1.0, 0.5, 0.25, 0.0)), expected, atol=1e-15, rtol=0)
    assert warped.lookup(torch.tensor([0.6, 0.6], dtype=F64)).tolist() == [0, 1]


@pytest.mark.parametrize("time", [-1e-9, 1.5, float("nan")])
@pytest.mark.parametrize("ratio", [None, torch.tensor([2.0, 0.5], dtype=F64)], ids=["plain", "warped"])
def test_times_outside_are_refused(time, ratio):
    warped = WarpedWindows(TimeWindows.uniform(2), 2, ratio)
    for ask in (warped.lookup, warped.bounds):
        with pytest.raises(ValueError, match=r"times must lie in \[0, 1\], got"):
            ask(torch.tensor([0.5, time], dtype=F64))
