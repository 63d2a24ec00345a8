"""Overlapping windows: the weights, the densities, and the blended optimum, each against its closed form."""

import pytest
import torch
from networks import batch, tiny_network
from problems import Gaussian

from opensora_perflow import PeRFlow
from opensora_perflow.conventions import expand_like, shift_time, unshift_time
from opensora_perflow.hosts import stdit
from opensora_perflow.hosts.timestep_transform import shift_ratio
from opensora_perflow.overlap import place_windows
from opensora_perflow.schedule import sampling_grid
from opensora_perflow.windows import TimeWindows

F64 = torch.float64
UNEVEN = TimeWindows((1.0, 0.7, 0.6, 0.0))  # ramps of overlap=0.4: 0.04 at both inner edges


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_without_overlap_windows_are_looked_up():
    u = torch.tensor([1.0, 0.7, 0.65, 0.3, 0.0], dtype=F64)
    placed = place_windows([UNEVEN], u)
    index = UNEVEN.lookup(u)
    u_start, u_end = UNEVEN.bounds(index)
    assert torch.equal(placed.window_idx, index)
    assert torch.equal(placed.u_start, u_start) and torch.equal(placed.u_end, u_end) and torch.equal(placed.u_edge, u_start)
    assert torch.equal(placed.route, torch.tensor(UNEVEN.edges, dtype=F64)[:, None].expand(-1, 5))
    positions = torch.rand(3, 5, dtype=F64)
    torch.testing.assert_close(placed.times(positions), u_end + (u_start - u_end) * positions)


@pytest.mark.parametrize(
    "u, weights",
    [(0.75, (1, 0, 0)), (0.74, (1, 0, 0)), (0.72, (0.75, 0.25, 0)), (0.7, (0.5, 0.5, 0)), (0.67, (0.125, 0.875, 0)),
     (0.65, (0, 1, 0)), (0.63, (0, 0.875, 0.125)), (0.57, (0, 0.125, 0.875)), (0.5, (0, 0, 1)), (0.0, (0, 0, 1))],
)  # fmt: skip
def test_windows_are_drawn_with_weights_that_fall_linearly_over_the_overlap(u, weights):
    count = 20_000
    placed = place_windows([UNEVEN], torch.full((count,), u, dtype=F64), overlap=0.4, generator=generator())
    shares = torch.bincount(placed.window_idx, minlength=3).double() / count
    expected = torch.tensor(weights, dtype=F64)
    # Four standard errors of a share of 1/2.
    torch.testing.assert_close(shares, expected, atol=4 * 0.5 / count**0.5, rtol=0)
    assert (shares[expected == 0] == 0).all() and expected.sum() == 1
    assert ((placed.u_end <= u) & (u <= placed.u_start)).all()


def test_windows_extend_over_inner_edges_only():
    placed = place_windows([UNEVEN], torch.tensor([0.9, 0.65, 0.3], dtype=F64), overlap=0.4)
    torch.testing.assert_close(placed.u_start, torch.tensor([1.0, 0.74, 0.64], dtype=F64))
    torch.testing.assert_close(placed.u_end, torch.tensor([0.66, 0.56, 0.0], dtype=F64))
    assert placed.u_edge.tolist() == [1.0, 0.7, 0.6]
    # A sampler on its way takes whole windows, and a shorter step to the extended start.
    assert placed.route[:, 2].tolist() == [1.0, 0.7, placed.u_start[2].item(), 0.0]


@pytest.mark.parametrize("overlap", [0.1, 0.5])
def test_places_in_all_windows_cover_time_evenly(overlap):
    """Windows drawn by width, places drawn evenly: a partition of unity gives back the uniform density."""
    middle = torch.tensor([0.85, 0.65, 0.3], dtype=F64)  # where no ramp reaches: the windows themselves
    width = torch.tensor([0.3, 0.1, 0.6], dtype=F64)
    places = (torch.arange(10_000, dtype=F64) + 0.5) / 10_000
    grid = torch.linspace(0, 1, 101, dtype=F64)
    covered = torch.zeros(101, dtype=F64)
    for k in range(3):
        window = place_windows([UNEVEN], middle[k, None], overlap=overlap)
        times = window.times(places[:, None])[:, 0]
        assert (times.diff() > 0).all() and times[0] > window.u_end[0] - 1e-12 and times[-1] <= window.u_start[0]
        covered += width[k] * (times[:, None] <= grid).double().mean(dim=0)
    torch.testing.assert_close(covered, grid, atol=2e-4, rtol=0)  # 1e-4 from each step of the distribution function


def test_the_ends_of_a_window_are_its_first_and_last_place():
    window = place_windows([UNEVEN], torch.tensor([0.65], dtype=F64), overlap=0.4)
    ends = window.times(torch.tensor([[1.0], [0.0]], dtype=F64))[:, 0]
    torch.testing.assert_close(ends, torch.tensor([0.74, 0.56], dtype=F64))


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
    teacher, windows, overlap, u, count = Gaussian(), TimeWindows.uniform(2), 0.4, 0.55, 400_000
    time = torch.full((count,), u, dtype=F64)
    placed = place_windows([windows], time, overlap=overlap, generator=generator())
    start, end = placed.u_start, placed.u_end  # 1 -> 0.3 or 0.7 -> 0; the ramps reach from 0.3 to 0.7
    assert sorted(set(start.tolist())) == pytest.approx([0.7, 1.0])
    x_start = (1 - start) * teacher.m + teacher.std(start) * torch.randn(count, dtype=F64, generator=generator(1))
    x_end = teacher.exact(x_start[:, None], start, end)[:, 0]
    x = x_start + (x_end - x_start) * (u - start) / (end - start)
    v = (x_end - x_start) / (end - start)

    weights, parts = {1.0: (u - 0.3) / 0.4, 0.7: (0.7 - u) / 0.4}, []
    for u_start, weight in weights.items():
        bounds = [torch.tensor([value], dtype=F64) for value in (u, u_start, 0.3 if u_start == 1 else 0.0)]
        mean, std = (1 - bounds[1]) * teacher.m, teacher.std(bounds[1])
        ends = teacher.exact(torch.stack([mean, mean + std]), bounds[1], bounds[2])[:, 0]
        done = (u - u_start) / (bounds[2] - u_start)
        line = torch.lerp(mean, ends[0], done), torch.lerp(std, ends[1] - ends[0], done)  # mean, std of the line's states
        density = weight * torch.exp(-0.5 * ((x - line[0]) / line[1]) ** 2) / line[1]
        parts.append((density, teacher.window_velocity(x[:, None], *(b.expand(count) for b in bounds))[:, 0]))
    blend = sum(d * v_k for d, v_k in parts) / sum(d for d, _ in parts)

    order = x.argsort()
    learned, exact = (value[order].reshape(40, -1).mean(dim=1) for value in (v, blend))
    split = (parts[0][1] - parts[1][1])[order].reshape(40, -1).abs().mean(dim=1)
    # A bin's mean of 10^4 draws between two velocities: five standard errors of a share of 1/2.
    assert ((learned - exact).abs() < 5 * 0.5 * split / 100 + 1e-6).all()
    # The windows do differ here, so the blend is neither of them.
    one = parts[0][1][order].reshape(40, -1).mean(dim=1)
    assert ((learned - one).abs() > 5 * 0.5 * split / 100).float().mean() > 0.8


@pytest.mark.parametrize("overlap", [-0.1, 0.6])
def test_an_overlap_whose_ramps_would_meet_is_refused(overlap):
    with pytest.raises(ValueError, match=r"overlap must lie in 0..0.5"):
        place_windows([UNEVEN], torch.tensor([0.5], dtype=F64), overlap=overlap)


# --- through the scheduler ---


def record(scheduler):
    seen = []

    def objective(student, pair, t, frame_weights):
        seen.append((pair, t))
        return student(pair.point(t), t).flatten(1).mean(dim=1)

    scheduler._objective = objective
    return seen


def run(network, count=32, **settings):
    scheduler = PeRFlow(windows=4, teacher=dict(steps_per_window=2), **settings)
    seen = record(scheduler)
    x, args = batch(network, count)
    scheduler.training_losses(network, x, args)
    return seen, args


def test_the_teacher_solves_the_extended_window_and_the_edge_mass_stays_at_the_edge():
    seen, args = run(
        tiny_network(), use_timestep_transform=True, transform="v1.2",
        draws=dict(overlap=0.4, edge_mass=0.5, per_solve=2, starts="student"),
    )  # fmt: skip
    (pair, t_edge), (_, t) = seen
    u_start, u_end, u_edge = (unshift_time(v, shift_ratio(args, "v1.2")) for v in (pair.t_start, pair.t_end, t_edge))
    inner = u_start < 1 - 1e-9
    torch.testing.assert_close((u_start - u_edge)[inner], torch.full((int(inner.sum()),), 0.1, dtype=F64))
    assert ((pair.t_end <= t) & (t <= pair.t_start)).all()
    lengths = {round(v, 6) for v in (u_start - u_end).tolist()}
    assert lengths <= {0.35, 0.45}  # extended on one side or both


def test_grids_give_windows_of_every_grid_and_start_where_that_grids_sampler_arrives():
    network = tiny_network()
    scheduler = PeRFlow(windows=4, draws=dict(grids=(5, 6), starts="student"), teacher=dict(steps_per_window=1))
    seen = record(scheduler)
    x, args = batch(network, 64)
    noise = torch.randn_like(x)
    scheduler.training_losses(network, x, args, noise=noise)
    pair = seen[0][0]
    assert {round(1 / v) for v in (pair.t_start - pair.t_end).tolist()} == {4, 5, 6}
    row = int(((pair.t_start - 0.8).abs() < 1e-9).nonzero()[0])  # the second window of grid 5
    times = torch.tensor(sampling_grid(TimeWindows.uniform(1), 5), dtype=F64)
    with torch.no_grad():
        reached = first_step(network, args, noise, times)
    torch.testing.assert_close(pair.x_start[row], reached[row], rtol=1e-5, atol=1e-6)  # float32


def first_step(network, args, noise, times):
    """Of a sampler, guided as student starts are."""
    condition = stdit.training_condition(network, args)
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
    times = PeRFlow(windows=4, num_sampling_steps=5, sampling_grid="uniform")._sampling_times(x, {})
    torch.testing.assert_close(times[:, 0], 1 - torch.arange(6, dtype=F64) / 5)
    edges = PeRFlow(windows=4, num_sampling_steps=5)._sampling_times(x, {})
    assert edges[:, 1].tolist() == [1.0, 0.875, 0.75, 0.5, 0.25, 0.0]


def test_warped_overlaps_keep_their_order():
    ratio = torch.tensor([0.25, 4.0], dtype=F64)
    placed = place_windows([TimeWindows.uniform(4)], torch.tensor([0.6, 0.6], dtype=F64), overlap=0.25)
    route = shift_time(placed.route, ratio)
    assert (route.diff(dim=0) < 0).all()
