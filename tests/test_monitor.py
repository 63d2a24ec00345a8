"""The run's own measure of the student: its value, when it is taken, and what is said of it."""

import json
import logging

import pytest
import torch
from networks import CountCalls, Reference13, batch, tiny_network
from problems import Gaussian

from opensora_perflow import PeRFlow
from opensora_perflow.conventions import shift_time
from opensora_perflow.hosts.v1.players import TrainingPlayers
from opensora_perflow.hosts.v1.timestep_transform import shift_ratio
from opensora_perflow.method.grids import linear_grid
from opensora_perflow.method.solvers import euler_step
from opensora_perflow.training.monitor import HeldOutBatch, held_out_error
from opensora_perflow.training.recipe import WatchSettings

F64 = torch.float64


def test_the_held_out_error_is_the_velocitys_distance_from_the_teachers_windows():
    field, times = Gaussian(), torch.tensor([1.0, 0.6, 0.1, 0.0], dtype=F64)[:, None].expand(-1, 50)
    x = torch.randn(50, 3, dtype=F64)
    states = torch.stack([field.exact(x, times[0], t) for t in times])

    def student(x, t):
        end = torch.where(t == 1.0, 0.6, torch.where(t == 0.6, 0.1, 0.0))
        return (field.exact(x, t, end) - x) / (end - t)[:, None]

    assert held_out_error(student, states, times) < 1e-6  # objectives return float32
    wrong = held_out_error(lambda x, t: student(x, t) + 0.3 * (t == 0.6)[:, None], states, times)
    assert wrong == pytest.approx(0.3 / 3**0.5, rel=1e-5)  # one window of three is off by 0.3


EDGES = torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=F64)
GRIDS = linear_grid(EDGES[:-1], EDGES[1:], 4).T


def end_errors(held, grids):
    """Root mean squares over samples of how far from the teacher's end the student, and an untrained network, lead."""
    return tuple(values.mean().sqrt().item() for values in held.squared_ends(grids))


def gaussian_batch(student=None):
    """Held-out noise of the closed-form Gaussian; an untrained network is the field itself."""
    field = Gaussian()

    def exact(x, times, k):
        return field.exact(x, times[0], times[-1])

    def untrained(bounds):
        return field

    return field, HeldOutBatch(torch.randn(64, 3, dtype=F64), solve=exact, student=student or untrained, untrained=untrained)


def jumping(shift=0.0):
    """A student that lands where the teacher does, and `shift` beside it for each unit of time."""
    field = Gaussian()

    def student(bounds):
        def velocity(x, t):
            start, end = bounds(t)
            return (field.exact(x, start, end) - x) / (end - start)[:, None] - shift

        return velocity

    return student


def test_the_end_is_that_of_one_step_in_each_window():
    field, held = gaussian_batch(jumping())
    error, untrained = end_errors(held, GRIDS)
    x = held.start
    for start, end in zip(EDGES, EDGES[1:]):
        x = euler_step(field, x, start.expand(64), end.expand(64))
    exact = field.exact(held.start, EDGES[:1].expand(64), EDGES[-1:].expand(64))
    assert error < 1e-6  # the mean is taken in float32
    assert untrained == pytest.approx((x - exact).square().mean().sqrt().item(), rel=1e-5)
    assert held.velocity_error(GRIDS) < 1e-6  # objectives return float32


def test_errors_of_windows_add_up_at_the_end():
    """Alike in every window, .2 a unit of time moves the last window's end by .2 of its length, and earlier ones as far as the
    teacher's flow carries them: by sqrt(var(0) / var(t)), the closed form's own factor."""
    field, held = gaussian_batch(jumping(shift=0.2))
    lengths = EDGES[:-1] - EDGES[1:]
    moved = [
        field.exact(torch.ones(1, 3, dtype=F64), end[None], EDGES[-1:])
        - field.exact(torch.zeros(1, 3, dtype=F64), end[None], EDGES[-1:])
        for end in EDGES[1:]
    ]
    expected = sum(0.2 * length * factor[0, 0] for length, factor in zip(lengths, moved)).item()
    assert end_errors(held, GRIDS)[0] == pytest.approx(expected, rel=1e-5)
    assert held.velocity_error(GRIDS) == pytest.approx(0.2, rel=1e-5)


def test_frames_without_weight_do_not_count():
    field = lambda bounds: lambda x, t: torch.zeros_like(x)  # noqa: E731
    start = torch.randn(2, 4, 3, 2, 2)
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    teacher = torch.stack([start, start + torch.tensor([1.0, 2.0, 4.0])[:, None, None]])
    held = HeldOutBatch(start, solve=lambda x, times, k: teacher[-1], student=field, untrained=field, frame_weights=weights)
    grids = torch.tensor([[1.0, 0.0]], dtype=F64)
    assert end_errors(held, grids)[0] == pytest.approx(((1 + 4) / 2 / 2 + 1 / 2) ** 0.5)


def test_the_path_is_solved_once_until_it_is_forgotten():
    field, held = gaussian_batch()
    solved, solve = [], held.solve
    held.solve = lambda x, times, k: solved.append(k) or solve(x, times, k)
    end_errors(held, GRIDS), end_errors(held, GRIDS), held.velocity_error(GRIDS)
    assert solved == [0, 1, 2]  # once a window
    held.forget()
    held.velocity_error(GRIDS)
    assert len(solved) == 6


# --- through the scheduler ---


def step(scheduler, network):
    x, args = batch(network)
    return scheduler.training_losses(network, x, args)["loss"]


def test_a_run_measures_itself_after_so_many_steps(caplog):
    network = tiny_network()
    scheduler = PeRFlow(windows=4, watch=dict(every=2), guidance=dict(mode="fixed", scale=3.0))
    with caplog.at_level(logging.INFO, logger="opensora_perflow"):
        for _ in range(6):
            step(scheduler, network)
        with torch.no_grad():
            step(scheduler, network)  # an evaluation is no step
    lines = [record.getMessage() for record in caplog.records if "held-out" in record.getMessage()]
    assert [line.split()[2] for line in lines] == ["1", "2", "4"]
    # Nothing was trained: the student is its teacher's copy, to the last bit.
    error, untrained = end_errors(scheduler.run.monitor.batches[0], scheduler.run.solver_grids)
    assert error == untrained > 0


def test_each_window_of_the_held_out_path_has_its_own_scale(monkeypatch):
    """Not those of the windows that the run's first step drew for the same samples."""
    network, asked = tiny_network(), []
    scheduler = PeRFlow(windows=4, guidance=dict(mode="fixed", scale=[5.0, 3.0, 2.0, 1.0]))
    step(scheduler, network)
    teacher = TrainingPlayers.teacher
    monkeypatch.setattr(
        TrainingPlayers, "teacher", lambda players, scale: asked.append(scale.tolist()) or teacher(players, scale)
    )
    end_errors(scheduler.run.monitor.batches[0], scheduler.run.solver_grids)
    assert asked == [[5.0, 5.0], [3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]


def test_what_a_measurement_costs():
    """For each batch of two that is kept: K windows of S guided midpoint steps and one untrained step each, once; then one
    evaluation of the student a window."""
    network = tiny_network()
    costs = {}
    for name, watch in (("off", None), ("on", dict(every=2))):
        scheduler = PeRFlow(windows=4, watch=watch, guidance=dict(mode="fixed", scale=3.0))
        step(scheduler, network)
        teacher, student = CountCalls(scheduler.run.teacher.network), CountCalls(network)
        for _ in range(4):
            step(scheduler, network)
        costs[name] = teacher.samples, student.calls
    # Five batches of two samples; two steps, two stages, two branches.
    assert costs["on"][0] - costs["off"][0] == 5 * 2 * (4 * 2 * 2 * 2 + 4)
    assert costs["on"][1] - costs["off"][1] == (2 + 3 + 5) * 4  # measured after 1, 2 and 4 steps


def test_as_many_first_batches_are_kept_as_sixteen_samples_take():
    network, scheduler = tiny_network(), PeRFlow(windows=4)
    for steps in range(10):
        step(scheduler, network)
        assert len(scheduler.run.monitor.batches) == min(steps + 1, 8)
    starts = torch.cat([held.start for held in scheduler.run.monitor.batches])
    assert len(starts) == 16 and len({float(start.sum()) for start in starts}) == 16  # noise of its own for each
    scheduler = PeRFlow(windows=4, watch=None, curriculum=dict(windows=[4, 2]))
    for _ in range(2):
        step(scheduler, network)
    assert len(scheduler.run.monitor.batches) == 1  # a curriculum alone measures on one


def test_watching_changes_neither_the_draws_nor_the_loss():
    results = []
    for watch in (None, dict(every=1)):
        network = tiny_network()
        torch.manual_seed(3)
        scheduler = PeRFlow(windows=4, watch=watch)
        results.append(torch.stack([step(scheduler, network).detach() for _ in range(3)]))
    assert torch.equal(*results)


def test_the_held_out_error_of_a_straight_teacher_is_zero_until_the_student_moves():
    network = Reference13().eval()
    with torch.no_grad():
        network.gain.zero_()  # neither x nor t matters: every window is straight
    scheduler = PeRFlow(windows=4, curriculum=dict(windows=[4, 2]), use_timestep_transform=True, transform="v1.2")
    x, args = batch(network, 2)
    args.update(num_frames=torch.tensor([17.0, 102.0]))
    mask = torch.tensor([[True] * 5, [False] + [True] * 4])
    scheduler.training_losses(network, x, args, mask=mask)
    best = scheduler.curriculum.progress.best
    assert best < 1e-5  # float32 states divided by windows of about 1/4
    held = scheduler.run.monitor.batches[0]
    ratio = shift_ratio(args, "v1.2")
    edges = shift_time(torch.linspace(1, 0, 5, dtype=F64)[:, None].expand(-1, 2), ratio)
    velocity = held.states.diff(dim=0) / edges.diff(dim=0)[:, :, None, None, None, None].float()
    torch.testing.assert_close(velocity[:, 0], velocity[:1, 0].expand(4, -1, -1, -1, -1), atol=1e-5, rtol=0)
    assert torch.equal(held.states[-1][1, :, 0], x[1, :, 0])  # a frozen frame stands still
    original = network.forward
    network.forward = lambda *a, **k: original(*a, **k) + 0.25
    assert held.velocity_error(scheduler.run.solver_grids) == pytest.approx(0.25, rel=1e-4)
    # The whole way from t = 1 to 0; of the sample that has a frozen frame the four others count.
    error, untrained = end_errors(held, scheduler.run.solver_grids)
    assert error == pytest.approx(0.25, rel=1e-4) and untrained < 1e-5


def test_a_repeated_init_keeps_what_is_measured_unless_windows_change():
    scheduler, network = PeRFlow(windows=4), tiny_network()
    step(scheduler, network)
    held, teacher = scheduler.run.monitor.batches, scheduler.run.teacher.network
    scheduler.__init__(windows=4, num_sampling_steps=8)
    assert scheduler.run.monitor.batches is held
    scheduler.__init__(windows=2)
    assert not scheduler.run.monitor.batches and scheduler.run.teacher.network is teacher


@pytest.mark.parametrize(
    "watch, message",
    [
        (200, "watch must be a dict or None, got 200; known keys: every, tolerance"),
        (dict(every=0), "watch.every must be an integer >= 1, got 0"),
        (dict(tolerance=-1), "watch.tolerance must be a number >= 0, got -1"),
        (dict(evry=3), "did you mean every"),
    ],
)
def test_its_settings_are_checked(watch, message):
    with pytest.raises(ValueError, match=message):
        PeRFlow(watch=watch)


def test_its_settings_survive_json():
    config = dict(watch=dict(every=50, tolerance=0.5))
    assert PeRFlow(**json.loads(json.dumps(config))).recipe.watch == WatchSettings(50, 0.5)
    assert PeRFlow(watch=None).recipe.watch is None and PeRFlow().recipe.watch == WatchSettings()


@pytest.mark.parametrize("changed", [dict(teacher=dict(steps_per_window=1)), dict(guidance=dict(mode="fixed", scale=5.0))])
def test_a_repeated_init_with_another_teachers_path_is_measured_anew(changed):
    settings = dict(windows=4, guidance=dict(mode="fixed", scale=3.0))
    scheduler, network = PeRFlow(**settings), tiny_network()
    step(scheduler, network)
    scheduler.__init__(**{**settings, **changed})
    assert not scheduler.run.monitor.batches
    step(scheduler, network)
    fresh = PeRFlow(**{**settings, **changed})
    step(fresh, network)
    errors = [end_errors(s.run.monitor.batches[0], s.run.solver_grids) for s in (scheduler, fresh)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)
