import itertools
import math

import pytest
import torch
from problems import Constant, Gaussian, LinearInState, LinearInTime

from opensora_perflow.conventions import shift_time
from opensora_perflow.method.grids import sampling_grid
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.planning.extra_steps import grids_by_steps
from opensora_perflow.planning.fine_path import follow, step_errors, uniform_grid
from opensora_perflow.planning.grids import carried_grid, choose_grid, compare
from opensora_perflow.planning.probe import Probe, join
from opensora_perflow.planning.shortest_path import shortest_path
from opensora_perflow.planning.windows import added_errors, local_errors, plan_windows

F64 = torch.float64


def noise(batch_size=3, seed=0):
    return torch.randn(batch_size, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))


def late(x, t):
    """v = 0 above t = 1/2 and 6 (1/2 - t) below: only steps in the second half err."""
    return 6 * (0.5 - t).clamp(min=0)[:, None].expand_as(x)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
def test_shortest_path_equals_brute_force(seed, num_steps):
    cost = torch.rand(7, 7, dtype=F64, generator=torch.Generator().manual_seed(seed))
    cost[1, 3] = math.inf
    inner = itertools.combinations(range(1, 6), num_steps - 1)
    ways = [(0, *chosen, 6) for chosen in inner]
    totals = {way: sum(cost[i, j].item() for i, j in zip(way, way[1:])) for way in ways}
    indices, total = shortest_path(cost, num_steps)
    assert indices == min(totals, key=totals.get)
    assert total == pytest.approx(min(totals.values()), rel=1e-14)


def test_shortest_path_equidistributes():
    # Cost h^2 of a step of width h: equal steps are best, at a total of N (1/N)^2. Weighted to 4 h^2 below u = 1/2 they are
    # half as wide there: of 6 steps, 2 of width 1/4 above and 4 of width 1/8 below.
    u = 1 - torch.arange(17, dtype=F64) / 16
    square = (u[:, None] - u[None]).square()
    assert shortest_path(square, 4) == ((0, 4, 8, 12, 16), pytest.approx(1 / 4))
    weighted = torch.where(u[:, None] > 0.5, square, 4 * square)
    weighted[:8, 9:] = math.inf  # no step across the middle
    assert shortest_path(weighted, 6)[0] == (0, 4, 8, 10, 12, 14, 16)


@pytest.mark.parametrize("steps", [0, 4])
def test_more_steps_than_intervals_are_refused(steps):
    probe = Probe(Constant(), noise())
    path = follow(probe, 3, substeps=1)
    for plan in (lambda: shortest_path(torch.ones(4, 4), steps), lambda: carried_grid(probe, path, steps)):
        with pytest.raises(ValueError, match=f"allow 1 to 3 steps, got {steps}"):
            plan()


def test_costs_without_a_path_are_refused():
    with pytest.raises(ValueError, match="no grid of 1 steps avoids the forbidden"):
        shortest_path(torch.full((3, 3), math.inf), 1)
    with pytest.raises(ValueError, match="not a number"):
        shortest_path(torch.full((3, 3), math.nan), 1)


@pytest.mark.parametrize("ratio", [None, 2.5])
def test_the_fine_path_is_the_solution_at_its_times(ratio):
    field, x = Gaussian(), noise()
    ratio = None if ratio is None else torch.full((3,), ratio, dtype=F64)
    path = follow(Probe(field, x, ratio), 8, substeps=16, method="heun")
    assert path.times.tolist() == [1 - k / 8 for k in range(9)]
    exact_times = shift_time(path.times[:, None].expand(-1, 3), ratio)
    torch.testing.assert_close(path.flow_times, exact_times, atol=0, rtol=0)
    for t, state, v in zip(path.flow_times, path.states, path.velocities):
        # 128 Heun steps: h^2 = 6e-5
        torch.testing.assert_close(state, field.exact(x, torch.ones(3, dtype=F64), t), atol=2e-4, rtol=0)
        torch.testing.assert_close(v, field(state, t), atol=0, rtol=0)


def test_field_calls_of_the_fine_path():
    field = Constant()
    follow(Probe(field, noise()), 5, substeps=3, method="midpoint")
    assert field.calls == 5 * 3 * 2 + 1


def test_wrong_settings_of_the_fine_path_are_refused():
    with pytest.raises(ValueError, match="the number of candidate intervals must be an integer >= 1"):
        follow(Probe(Constant(), noise()), 0)
    with pytest.raises(ValueError, match="solver steps between two candidates must be an integer >= 1"):
        follow(Probe(Constant(), noise()), 2, substeps=0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        follow(Probe(Constant(math.nan), noise()), 2)


def test_step_errors_are_those_of_one_euler_step():
    # v = 2 t: a step of width h lands h^2 beside the solution.
    errors = step_errors(follow(Probe(LinearInTime(), noise()), 4, substeps=1, method="heun"))
    expected = torch.tensor([[max(0, j - i) ** 2 / 16 for j in range(5)] for i in range(5)], dtype=F64)
    torch.testing.assert_close(errors, expected, atol=1e-12, rtol=0)


def test_the_planned_grid_puts_steps_where_the_field_bends():
    probe = Probe(late, noise())
    path = follow(probe, 6, substeps=32, method="heun")
    fresh = Probe(late, noise(5, seed=1))
    plan = compare(*choose_grid(probe, path, 3), fresh, follow(fresh, 6, substeps=32, method="heun").endpoints)
    # A step errs by 6 h^2 / 2, with h its width below t = 1/2: three equal shares of the bent half are best.
    assert plan.grid == pytest.approx((1, 1 / 3, 1 / 6, 0))
    assert plan.error == pytest.approx(3 * 3 / 36, rel=1e-3)
    assert plan.uniform == pytest.approx(3 * (1 / 36 + 1 / 9), rel=1e-3)
    assert plan.better and plan.predicted == pytest.approx(plan.error, rel=1e-6)


def test_uniform_steps_stay_where_nothing_beats_them():
    # v = 2 t: the error of a grid is the sum of squared widths, least for equal ones.
    probe = Probe(LinearInTime(), noise())
    path = follow(probe, 8, substeps=1, method="heun")
    plan = compare(*choose_grid(probe, path, 4), probe, path.endpoints)
    assert plan.grid == uniform_grid(4) and not plan.better and plan.gain == 0


def test_carried_grid_is_the_best_of_all_where_errors_only_add():
    probe = Probe(late, noise())
    path = follow(probe, 6, substeps=32, method="heun")
    indices, error = carried_grid(probe, path, 3)
    ways = [(0, *chosen, 6) for chosen in itertools.combinations(range(1, 6), 2)]
    errors = [(probe.sample(path.times[list(way)]) - path.endpoints).square().mean().sqrt().item() for way in ways]
    assert ways[errors.index(min(errors))] == indices
    assert error == pytest.approx(min(errors), rel=1e-12)


def test_gain_counts_standard_errors():
    fresh = Probe(LinearInState(1.0), noise(64))
    endpoints = fresh.sample(uniform_grid(2000))
    better = compare((1.0, 0.3, 0.0), 0.0, fresh, fresh.sample((1.0, 0.3, 0.0)))
    worse = compare((1.0, 0.05, 0.0), 0.0, fresh, endpoints)
    assert better.error == 0 and better.gain > 2 and not worse.better and worse.gain < -2


def test_joined_probes_keep_their_own_fields():
    parts = [Probe(Constant(1.0), noise(2)), Probe(Constant(-2.0), noise(3))]
    both = join(parts)
    assert torch.equal(both.sample(uniform_grid(4)), torch.cat([part.sample(uniform_grid(4)) for part in parts]))
    assert join(parts[:1]) is parts[0]
    warped = [Probe(p.velocity, p.noise, torch.full((len(p.noise),), r, dtype=F64)) for p, r in zip(parts, (2.0, 3.0))]
    assert join(warped).ratio.tolist() == [2.0, 2.0, 3.0, 3.0, 3.0]


def test_extra_steps_go_where_they_help():
    # Of the windows 1..1/2 and 1/2..0 only the second bends: all extra steps belong there.
    probe = Probe(late, noise())
    endpoints = follow(probe, 8, substeps=64, method="heun").endpoints
    found = grids_by_steps(probe, endpoints, (1.0, 0.5, 0.0), 5)
    assert sorted(found) == [1, 2, 3, 4, 5]
    assert found[1].grid == (1.0, 0.0) and found[2].grid == (1.0, 0.5, 0.0)
    for steps in (3, 4, 5):
        assert set(found[steps - 1].grid) < set(found[steps].grid) and found[steps].grid[1] == 0.5
        assert found[steps].error < found[steps - 1].error
        measured = (probe.sample(found[steps].grid) - endpoints).square().mean().sqrt().item()
        assert found[steps].error == pytest.approx(measured, rel=1e-12)


def test_fewer_steps_than_windows_drop_the_edge_that_matters_least():
    probe = Probe(late, noise())
    endpoints = follow(probe, 8, substeps=64, method="heun").endpoints
    found = grids_by_steps(probe, endpoints, (1.0, 0.75, 0.5, 0.0), 3)
    assert found[2].grid == (1.0, 0.5, 0.0)  # 0.75 lies on a straight piece


def test_grown_grids_are_never_worse_than_the_default_ones():
    probe = Probe(LinearInTime(), noise())
    endpoints = probe.sample((1.0, 0.5, 0.0), method="heun")
    found = grids_by_steps(probe, endpoints, (1.0, 0.9, 0.5, 0.0), 6, places=(0.5,))
    windows = TimeWindows((1.0, 0.9, 0.5, 0.0))
    for steps, measured in found.items():
        default = (probe.sample(sampling_grid(windows, steps)) - endpoints).square().mean().sqrt().item()
        assert measured.error <= default * (1 + 1e-6)
    # 5 steps: halving the widest windows, 1/4 + 1/4 and 1/5 + 1/5, and the first one as it is.
    assert found[5].grid == pytest.approx((1.0, 0.9, 0.7, 0.5, 0.25, 0.0))


def test_wrong_step_counts_are_refused():
    with pytest.raises(ValueError, match="the largest number of steps must be an integer >= 1"):
        grids_by_steps(Probe(Constant(), noise()), noise(), (1.0, 0.0), 0)


def test_local_errors_are_those_of_one_step_from_the_teachers_state():
    # A student that is the teacher itself: its one step across a window of width h of v = 2 t errs by h^2.
    probe = Probe(LinearInTime(), noise())
    path = follow(probe, (1.0, 0.6, 0.5, 0.0), substeps=1, method="heun")
    assert local_errors(probe, path) == pytest.approx([0.16, 0.01, 0.25], rel=1e-6)  # errors are taken in float32


def test_added_errors_are_what_each_window_adds_at_the_end():
    # A student that is the teacher itself, v = a x: a step across a window multiplies by 1 - a h, the teacher by e^{-a h}.
    a, edges, x = 1.3, (1.0, 0.6, 0.5, 0.0), noise(64)
    path = follow(Probe(LinearInState(a), x), edges, substeps=512, method="heun")
    size, ends = x.square().mean().sqrt().item(), []
    for k in range(4):  # from the teacher's state at edge k
        euler = math.prod(1 + a * (end - start) for start, end in zip(edges[k:], edges[k + 1 :]))
        ends.append(size * math.exp(a * (edges[k] - 1)) * abs(euler - math.exp(-a * edges[k])))
    expected = [(one**2 - rest**2) ** 0.5 for one, rest in zip(ends, ends[1:])]
    errors = added_errors(Probe(LinearInState(a), x), path)
    assert errors == pytest.approx(expected, rel=1e-4)  # the path has 1536 Heun steps; errors are taken in float32
    assert math.hypot(*errors) == pytest.approx(ends[0], rel=1e-4)


def test_a_window_whose_error_the_others_undo_is_not_free():
    # The student goes astray in the first window and comes back in the second.
    def student(x, t):
        return torch.where(t[:, None] > 0.5, 1.0, -1.0).expand_as(x).to(x.dtype)

    path = follow(Probe(Constant(0.0), noise()), (1.0, 0.5, 0.0), substeps=1)
    # From the start it ends at 0; from the middle it is 1/2 off. E_0 = 0 leaves nothing to share.
    assert added_errors(Probe(student, noise()), path) == [0.0, pytest.approx(0.5)]


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_planned_windows_err_alike(power):
    # Errors of 4 windows that follow the model exactly, with the density 3 above u = 1/2 and 1 below.
    def mass(start, end):
        return 3 * (max(start, 0.5) - max(end, 0.5)) + min(start, 0.5) - min(end, 0.5)

    pilot = (1.0, 0.75, 0.5, 0.2, 0.0)
    errors = [mass(a, b) ** power for a, b in zip(pilot, pilot[1:])]
    edges, predicted = plan_windows(pilot, errors, 4, power=power, resolution=96)
    # The whole mass is 2: windows of 1/2 each, which are 1/6 wide above and 1/2 below.
    assert edges == pytest.approx((1, 5 / 6, 2 / 3, 1 / 2, 0))
    assert predicted == pytest.approx([0.5**power] * 4)


def test_equal_errors_leave_uniform_windows():
    edges, predicted = plan_windows(uniform_grid(4), [0.2] * 4, 8)
    assert edges == uniform_grid(8)
    assert predicted == pytest.approx([0.2 / 2**1.5] * 8)


def test_errors_without_meaning_are_refused():
    for errors in ([0.1, 0.0], [0.1], [0.1, math.nan]):
        with pytest.raises(ValueError, match="a positive error for each of the pilot's 2 windows"):
            plan_windows((1.0, 0.5, 0.0), errors, 2)
