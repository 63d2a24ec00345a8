"""Overlapping windows: the weights, the densities, and the blended optimum, each against its closed form."""

import pytest
import torch
from networks import batch, tiny_network
from problems import Gaussian

from opensora_perflow import PeRFlow
from opensora_perflow.conventions import expand_like, unshift_time
from opensora_perflow.hosts.v1 import conditions, stdit
from opensora_perflow.hosts.v1.network import Interface
from opensora_perflow.hosts.v1.timestep_transform import shift_ratio
from opensora_perflow.method.grids import sampling_grid
from opensora_perflow.method.overlap import place_windows
from opensora_perflow.method.windows import TimeWindows

F64 = torch.float64
UNEVEN = TimeWindows((1.0, 0.7, 0.6, 0.0))  # overlap=0.4 reaches 0.12 above 0.7 and 0.04 above 0.6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_without_overlap_windows_are_looked_up():
    u = torch.tensor([1.0, 0.7, 0.65, 0.3, 0.0], dtype=F64)
    placed = place_windows([UNEVEN], u)
    index = UNEVEN.lookup(u)
    u_start, u_end = UNEVEN.bounds(index)
    assert torch.equal(placed.window_idx, index)
    assert torch.equal(placed.u_start, u_start) and torch.equal(placed.u_end, u_end)
    assert torch.equal(placed.route, torch.tensor(UNEVEN.edges, dtype=F64)[:, None].expand(-1, 5))
    positions = torch.rand(3, 5, dtype=F64)
    torch.testing.assert_close(placed.times(positions), u_end + (u_start - u_end) * positions)


@pytest.mark.parametrize(
    "u, weights",
    [(0.9, (1, 0, 0)), (0.82, (1, 0, 0)), (0.79, (0.75, 0.25, 0)), (0.73, (0.25, 0.75, 0)), (0.7, (0, 1, 0)),
     (0.65, (0, 1, 0)), (0.64, (0, 1, 0)), (0.61, (0, 0.25, 0.75)), (0.6, (0, 0, 1)), (0.3, (0, 0, 1)), (0.0, (0, 0, 1))],
)  # fmt: skip
def test_windows_are_drawn_with_weights_that_fall_linearly_above_the_edge(u, weights):
    count = 20_000
    placed = place_windows([UNEVEN], torch.full((count,), u, dtype=F64), overlap=0.4, generator=generator())
    shares = torch.bincount(placed.window_idx, minlength=3).double() / count
    expected = torch.tensor(weights, dtype=F64)
    # Four standard errors of a share of 1/2.
    torch.testing.assert_close(shares, expected, atol=4 * 0.5 / count**0.5, rtol=0)
    assert (shares[expected == 0] == 0).all()


def test_windows_keep_their_edges_and_reach_above_inner_ones():
    placed = place_windows([UNEVEN], torch.tensor([0.9, 0.65, 0.3], dtype=F64), overlap=0.4)
    assert placed.u_start.tolist() == [1.0, 0.7, 0.6] and placed.u_end.tolist() == [0.7, 0.6, 0.0]
    torch.testing.assert_close(placed.over_start, torch.tensor([0.0, 0.12, 0.04], dtype=F64))
    torch.testing.assert_close(placed.over_end, torch.tensor([0.12, 0.04, 0.0], dtype=F64))
    ends = placed.times(torch.tensor([[1.0], [0.0]], dtype=F64))
    torch.testing.assert_close(ends[0], torch.tensor([1.0, 0.82, 0.64], dtype=F64))
    torch.testing.assert_close(ends[1], placed.u_end)


@pytest.mark.parametrize("overlap", [0.0, 0.4, 1.0])
def test_places_in_all_windows_cover_time_evenly(overlap):
    """Each window as often as its weight's integral, places drawn evenly: a partition of unity is the uniform density."""
    middle = torch.tensor([1.0, 0.7, 0.6], dtype=F64)  # at edges nothing is drawn: the windows below them
    window = place_windows([UNEVEN], middle, overlap=overlap)
    share = torch.tensor([0.3, 0.1, 0.6], dtype=F64) + (window.over_start - window.over_end) / 2
    places = (torch.arange(10_000, dtype=F64) + 0.5) / 10_000
    times = window.times(places[:, None].expand(-1, 3))
    assert (times.diff(dim=0) > 0).all()
    assert (times > window.u_end).all() and (times <= window.u_start + window.over_start).all()
    grid = torch.linspace(0, 1, 101, dtype=F64)
    covered = (share * (times[:, :, None] <= grid[None, None]).double().mean(dim=0).T).sum(dim=1)
    # Each of three distribution functions has steps of 1e-4; at 0 and 1 they are exact.
    torch.testing.assert_close(covered, grid, atol=2e-4, rtol=0)


def test_grids_are_drawn_equally_often_with_their_own_edges():
    partitions = [TimeWindows.uniform(4), TimeWindows.uniform(5), TimeWindows.uniform(7)]
    u = torch.full((9000,), 0.79, dtype=F64)
    placed = place_windows(partitions, u, generator=generator())
    starts, counts = placed.u_start.unique(return_counts=True)
    torch.testing.assert_close(starts, torch.tensor([0.8, 6 / 7, 1.0], dtype=F64))
    torch.testing.assert_close(counts / 9000, torch.full((3,), 1 / 3), atol=4 * 0.48 / 9000**0.5, rtol=0)  # 4 std errors
    assert placed.route.shape == (8, 9000)
    torch.testing.assert_close(placed.route.gather(0, placed.window_idx[None])[0], placed.u_start)
    of_five = placed.u_start == starts[0]
    expected = torch.tensor([1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0], dtype=F64)
    torch.testing.assert_close(placed.route[:, of_five], expected[:, None].expand(-1, int(counts[0])))


def test_the_least_squares_optimum_of_an_overlap_is_the_blend_of_the_windows_velocities():
    """A Gaussian teacher: v_k(x, u) and the density of each window's lines are known, so the blend is too."""
    teacher, u, count = Gaussian(), 0.6, 400_000
    time = torch.full((count,), u, dtype=F64)
    placed = place_windows([TimeWindows.uniform(2)], time, overlap=0.5, generator=generator())
    start, end = placed.u_start, placed.u_end  # 1 -> 0.5 with weight 0.4; 0.5 -> 0, continued up to 0.75, with weight 0.6
    x_start = (1 - start) * teacher.m + teacher.std(start) * torch.randn(count, dtype=F64, generator=generator(1))
    x_end = teacher.exact(x_start[:, None], start, end)[:, 0]
    v = (x_end - x_start) / (end - start)
    x = x_start + (u - start) * v

    parts = []
    for u_start, weight in ((1.0, 0.4), (0.5, 0.6)):
        t, t_start, t_end = (torch.tensor([value], dtype=F64) for value in (u, u_start, u_start - 0.5))
        mean, std = (1 - t_start) * teacher.m, teacher.std(t_start)
        mean_end = teacher.exact(mean[:, None], t_start, t_end)[0]
        done = (u - u_start) / -0.5
        line_mean, line_std = mean + done * (mean_end - mean), std + done * (teacher.std(t_end) - std)
        density = weight * torch.exp(-0.5 * ((x - line_mean) / line_std) ** 2) / line_std
        v_k = teacher.window_velocity(x[:, None], *(value.expand(count) for value in (t, t_start, t_end)))[:, 0]
        parts.append((density, v_k))
    (upper, v_upper), (lower, v_lower) = parts
    blend = (upper * v_upper + lower * v_lower) / (upper + lower)

    order = x.argsort()
    learned, exact, alone, split = (
        value[order].reshape(40, -1).mean(dim=1) for value in (v, blend, v_upper, (v_upper - v_lower).abs())
    )
    error = 0.5 * split / 100  # standard error of a bin's mean: 10^4 draws between two velocities
    assert ((learned - exact).abs() < 5 * error + 1e-6).all()
    assert ((learned - alone).abs() > 5 * error).double().mean() > 0.8  # the windows differ, so the blend is neither


@pytest.mark.parametrize("overlap", [-0.1, 1.1])
def test_an_overlap_over_two_windows_is_refused(overlap):
    with pytest.raises(ValueError, match=r"overlap must lie in 0\.\.1"):
        place_windows([UNEVEN], torch.tensor([0.5], dtype=F64), overlap=overlap)


# --- through the scheduler ---


def record(scheduler):
    seen = []

    def objective(student, segment, t, frame_weights):
        seen.append((segment, t))
        return student(segment.point(t), t).flatten(1).mean(dim=1)

    scheduler.objective = objective
    return seen


def run(network, count=32, **settings):
    scheduler = PeRFlow(windows=4, teacher=dict(steps_per_window=2), **settings)
    seen = record(scheduler)
    x, args = batch(network, count)
    scheduler.training_losses(network, x, args)
    return seen, args


def test_overlaps_change_the_times_and_not_the_windows():
    seen, args = run(
        tiny_network(), use_timestep_transform=True, transform="v1.2",
        draws=dict(overlap=0.5, edge_mass=0.5, per_solve=3, starts="student"),
    )  # fmt: skip
    (segment, t_edge), *rest = seen
    assert torch.equal(t_edge, segment.t_start) and all(other is segment for other, _ in rest)
    ratio = shift_ratio(args, "v1.2")
    u_start, u_end = (unshift_time(v, ratio) for v in (segment.t_start, segment.t_end))
    torch.testing.assert_close(u_start - u_end, torch.full((32,), 0.25, dtype=F64))
    u = torch.stack([unshift_time(t, ratio) for _, t in rest])
    inner = u_start < 1 - 1e-9
    assert (u > u_end).all() and (u <= u_start + 0.125).all() and (u <= 1).all()
    assert (u > u_start)[:, inner].any() and not (u > u_start + 1e-9)[:, ~inner].any()


def test_grids_give_windows_of_every_grid_and_start_where_that_grids_sampler_arrives():
    network = tiny_network()
    scheduler = PeRFlow(windows=4, draws=dict(grids=(5, 6), starts="student"), teacher=dict(steps_per_window=1))
    seen = record(scheduler)
    x, args = batch(network, 64)
    noise = torch.randn_like(x)
    scheduler.training_losses(network, x, args, noise=noise)
    segment = seen[0][0]
    assert {round(1 / v) for v in (segment.t_start - segment.t_end).tolist()} == {4, 5, 6}
    row = int(((segment.t_start - 0.8).abs() < 1e-9).nonzero()[0])  # the second window of grid 5
    times = torch.tensor(sampling_grid(TimeWindows.uniform(1), 5), dtype=F64)
    with torch.no_grad():
        reached = first_step(network, args, noise, times)
    torch.testing.assert_close(segment.x_start[row], reached[row], rtol=1e-5, atol=1e-6)  # float32


def first_step(network, args, noise, times):
    """Of a sampler, guided as student starts are."""
    condition = conditions.training_condition(Interface.of(network), args)
    field = stdit.velocity_field(network, network, condition, num_timesteps=1000, text_scale=4.0, image_scale=4.0)
    t = torch.full((len(noise),), 1.0, dtype=F64)
    return noise + expand_like(times[1] - t, noise) * field(noise, t)


def test_nothing_is_drawn_and_nothing_changes_without_overlap():
    results = []
    for settings in ({}, dict(draws=dict(overlap=0.0, grids=()))):
        torch.manual_seed(5)
        results.append(run(tiny_network(), **settings)[0][0][1])
    assert torch.equal(*results)


@pytest.mark.parametrize("draws", [dict(overlap=0.2), dict(grids=(5,))])
def test_epsilon_predictions_do_not_blend(draws):
    network = tiny_network()
    x, args = batch(network)
    with pytest.raises(ValueError, match='prediction="ddim_eps" means another velocity in every window'):
        PeRFlow(path="ddpm", draws=draws).training_losses(network, x, args)


def test_the_uniform_grid_is_the_hosts_own():
    x = torch.zeros(2, 4, 5, 4, 4)
    scheduler = PeRFlow(windows=4, num_sampling_steps=5, sampling_grid="uniform")
    times = scheduler.warped({}, x).times(scheduler.grid)
    torch.testing.assert_close(times[:, 0], 1 - torch.arange(6, dtype=F64) / 5)
    scheduler = PeRFlow(windows=4, num_sampling_steps=5)
    edges = scheduler.warped({}, x).times(scheduler.grid)
    assert edges[:, 1].tolist() == [1.0, 0.875, 0.75, 0.5, 0.25, 0.0]
