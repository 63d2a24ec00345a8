"""Fewer windows stage by stage: the rule on synthetic errors, the grids, and the scheduler that follows it."""

import json
import logging
import math
from functools import partial

import pytest
import torch
from networks import PLAIN, CountCalls, Epsilon, batch, sizes, tiny_network

from opensora_perflow import PeRFlow
from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.v1 import conditions, stdit
from opensora_perflow.hosts.v1.host import OpenSora
from opensora_perflow.hosts.v1.network import Interface
from opensora_perflow.hosts.v1.timestep_transform import shift_ratio
from opensora_perflow.method.solvers import euler_step
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.training.curriculum import AdvanceRule, Curriculum, merge_windows
from opensora_perflow.training.state import write_state

F64 = torch.float64
UNEVEN = TimeWindows((1.0, 0.9, 0.6, 0.5, 0.0))


def rule_of(min_steps=1, max_steps=1000, **constants):
    """A rule with other constants than AdvanceRule's, which no config sets."""
    return type("OtherRule", (AdvanceRule,), constants)(min_steps, max_steps)


def follow(curriculum, errors):
    """Steps and measurements as the scheduler makes them; the steps at which stages began."""
    errors, began, step = iter(errors), [0], 0
    while not curriculum.is_last:
        if curriculum.wants_measurement() and curriculum.observe(next(errors)):
            curriculum.advance()
            began.append(step)
            continue
        curriculum.progress.step += 1
        step += 1
    return began


def test_merging_keeps_every_other_edge():
    assert merge_windows(UNEVEN, 2).edges == (1.0, 0.6, 0.0)
    assert merge_windows(TimeWindows.uniform(8), 2) == TimeWindows.uniform(2)
    assert Curriculum(UNEVEN, [4, 2, 1]).stages == [UNEVEN, TimeWindows((1.0, 0.6, 0.0)), TimeWindows((1.0, 0.0))]
    with pytest.raises(ValueError, match="4 windows cannot be merged evenly into 3"):
        merge_windows(UNEVEN, 3)


def test_a_stage_ends_when_its_error_stops_falling():
    rule = rule_of(every=10, patience=2, min_improvement=0.1)
    # 1.0 and 0.8 improve; 0.75 does not (less than a tenth), nor does 0.73: the stage ends at the fourth measurement, step 30.
    curriculum = Curriculum(TimeWindows.uniform(4), [4, 2, 1], rule=rule)
    assert follow(curriculum, [1.0, 0.8, 0.75, 0.73, 2.0, 3.0, math.nan]) == [0, 30, 50]
    assert curriculum.current == TimeWindows.uniform(1)


def test_a_slow_fall_is_measured_against_the_best_and_adds_up():
    rule = rule_of(every=1, patience=2, min_improvement=0.1)
    curriculum = Curriculum(TimeWindows.uniform(2), [2, 1], rule=rule)
    # 0.95 is no improvement on 1.0, 0.89 is; then 0.85 and 0.81 are none on 0.89.
    assert follow(curriculum, [1.0, 0.95, 0.89, 0.85, 0.81]) == [0, 4]


def test_a_stage_has_its_least_and_its_most_steps():
    rule = rule_of(every=10, patience=1, min_steps=40, max_steps=60)
    assert follow(Curriculum(TimeWindows.uniform(2), [2, 1], rule=rule), [1.0] * 9) == [0, 40]
    falling = (0.5**i for i in range(99))
    assert follow(Curriculum(TimeWindows.uniform(2), [2, 1], rule=rule), falling) == [0, 60]


def test_the_last_stage_neither_measures_nor_ends():
    curriculum = Curriculum(TimeWindows.uniform(2), [2, 1], rule=rule_of(patience=1))
    curriculum.advance()
    assert curriculum.is_last and not curriculum.wants_measurement() and not curriculum.observe(1.0)


def test_the_state_survives_json_and_continues_alike():
    rule = rule_of(every=5, patience=2, max_steps=100)
    errors = [1.0, 0.5, 0.6, 0.4, 0.5, 0.5, 3.0, 2.0, 2.5, 2.6]
    whole = Curriculum(TimeWindows.uniform(4), [4, 2, 1], rule=rule)
    first = Curriculum(TimeWindows.uniform(4), [4, 2, 1], rule=rule)
    assert first.state() == {"stage": 0, "step": 0, "best": None, "stale": 0}
    for _ in range(12):
        if first.wants_measurement():
            first.observe(errors[first.progress.step // 5])
        first.progress.step += 1
    second = Curriculum(TimeWindows.uniform(4), [4, 2, 1], rule=rule)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.progress == first.progress
    began = follow(whole, errors)
    assert follow(second, errors[3:]) == [0, *(step - 12 for step in began[1:])]


@pytest.mark.parametrize(
    "state, message",
    [({"stage": 1}, "a curriculum's state has the keys stage, step, best, stale, got stage"),
     ({"stage": 3, "step": 0, "best": None, "stale": 0}, r"the state is in stage 3, this curriculum has the stages 0\.\.2")],
)  # fmt: skip
def test_a_foreign_state_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(TimeWindows.uniform(4), [4, 2, 1]).restore(state)


@pytest.mark.parametrize("teacher", ["original", "previous"])
def test_the_teachers_steps_lie_on_the_finer_windows(teacher):
    curriculum = Curriculum(UNEVEN, [4, 2, 1], teacher)
    first = curriculum.solver_grids(2)
    assert first.dtype == F64 and first.tolist() == [
        pytest.approx(row) for row in ([1, 0.95, 0.9], [0.9, 0.75, 0.6], [0.6, 0.55, 0.5], [0.5, 0.25, 0])
    ]
    curriculum.advance()
    second = curriculum.solver_grids(2).tolist()
    if teacher == "previous":
        assert second == [[1.0, 0.9, 0.6], [0.6, 0.5, 0.0]]
    else:
        assert second == [pytest.approx([1, 0.95, 0.9, 0.75, 0.6]), pytest.approx([0.6, 0.55, 0.5, 0.25, 0])]
    curriculum.advance()
    assert len(curriculum.solver_grids(2)[0]) == (3 if teacher == "previous" else 9)
    assert curriculum.teacher_is_student == (teacher == "previous")


# --- through the scheduler ---

STAGES = dict(windows=[4, 2, 1], advance=dict(min_steps=1, max_steps=1))


@pytest.fixture
def quick(monkeypatch):
    """A measurement after every step, of which one decides: stages of STAGES last one step."""
    for name, value in dict(every=1, patience=1, min_improvement=0.5).items():
        monkeypatch.setattr(AdvanceRule, name, value)


def step(scheduler, network, **arguments):
    x, args = batch(network)
    return scheduler.training_losses(network, x, args, **arguments)["loss"]


def watched(scheduler):
    seen = []

    def objective(student, segment, t, frame_weights):
        seen.append(segment)
        return student(segment.point(t), t).flatten(1).mean(dim=1)

    scheduler.objective = objective
    return seen


def test_the_scheduler_merges_windows_and_keeps_the_original_teacher(quick, caplog):
    network = tiny_network()
    scheduler = PeRFlow(windows=4, curriculum=STAGES, teacher=dict(steps_per_window=2), draws=PLAIN["draws"])
    seen = watched(scheduler)
    with caplog.at_level(logging.INFO, logger="opensora_perflow"):
        for _ in range(6):
            step(scheduler, network)
    teacher = scheduler.run.teacher.network
    # Stages of 1 step each, and a measurement after it: the third window count from the fifth step on.
    lengths = [round(1 / (segment.t_start - segment.t_end).mean().item()) for segment in seen]
    assert lengths == [4, 4, 2, 2, 1, 1] and [len(segment.states) for segment in seen] == [3, 3, 5, 5, 9, 9]
    assert scheduler.run.teacher.network is teacher and scheduler.curriculum.is_last
    lines = [record.getMessage() for record in caplog.records if "curriculum" in record.getMessage()]
    assert len(lines) == 2 and "4 windows -> 2 after 1 steps" in lines[0] and "2 windows -> 1 after 1 steps" in lines[1]
    assert scheduler.warped({}, torch.zeros(1, 4, 5, 4, 4)).times(scheduler.grid)[:, 0].tolist() == [1.0, 0.0]


def test_the_student_of_a_stage_teaches_the_next_one_unguided_with_its_own_windows(quick, monkeypatch):
    network = tiny_network().train()
    settings = dict(teacher=dict(steps_per_window=2, solver="midpoint"), guidance=dict(mode="fixed", scale=3.0))
    scheduler = PeRFlow(windows=4, curriculum=dict(STAGES, teacher="previous"), **settings)
    seen = watched(scheduler)
    step(scheduler, network)
    original = CountCalls(scheduler.run.teacher.network)
    with torch.no_grad():
        network.final_layer.linear.bias += 0.5
    step(scheduler, network)  # measures at its end, and begins the second stage
    assert scheduler.curriculum.progress.stage == 1 and original.samples > 0
    teacher = scheduler.run.teacher.network
    assert torch.equal(teacher.final_layer.linear.bias, network.final_layer.linear.bias)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    count = CountCalls(teacher)
    before = original.calls
    monkeypatch.setattr(AdvanceRule, "every", 100)  # no more measurements
    scheduler.curriculum.progress.step = 1
    step(scheduler, network)
    assert (count.calls, count.samples) == (2, 4)  # two Euler steps of two unguided samples
    assert original.calls == before and len(seen[-1].states) == 3


def test_measuring_changes_neither_the_draws_nor_the_loss():
    results = []
    for settings in ({}, dict(curriculum=dict(windows=[4, 2]))):
        network = tiny_network()
        torch.manual_seed(3)
        scheduler = PeRFlow(windows=4, teacher=dict(steps_per_window=2), **settings)
        results.append(torch.stack([step(scheduler, network).detach() for _ in range(3)]))
    # The same steps of the teacher, written as one grid over all windows or as one grid a window: float32.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_the_first_batch_is_kept_and_measured(quick):
    network = tiny_network()
    scheduler = PeRFlow(windows=2, curriculum=dict(windows=[2, 1]), watch=None)
    measured = []
    for count in (2, 3, 2):
        x, args = batch(network, count)
        scheduler.training_losses(network, x, args)
        measured.append(scheduler.curriculum.state()["best"] is not None)
    assert measured == [True, True, True]
    assert [len(held.start) for held in scheduler.run.monitor.batches] == [2]
    assert scheduler.run.monitor.batches[0].states.shape == (3, 2, 4, 5, 4, 4)


def test_a_repeated_init_keeps_the_progress_unless_the_training_settings_change():
    scheduler = PeRFlow(windows=4, curriculum=STAGES)
    scheduler.curriculum.advance()
    scheduler.__init__(windows=4, curriculum=STAGES, cfg_scale=2.0)
    assert scheduler.curriculum.progress.stage == 1
    scheduler.__init__(windows=4, curriculum=dict(STAGES, teacher="previous"))
    assert scheduler.curriculum.progress.stage == 0
    scheduler.__init__(windows=4)
    assert scheduler.curriculum is None


def test_another_curriculum_keeps_the_original_teacher(quick):
    scheduler, network = PeRFlow(windows=4, curriculum=STAGES), tiny_network()
    for _ in range(3):
        step(scheduler, network)
    teacher = scheduler.run.teacher
    assert scheduler.curriculum.progress.stage == 1
    scheduler.__init__(windows=4, curriculum=dict(STAGES, windows=[4, 1]))
    assert scheduler.run.teacher is teacher and scheduler.run.curriculum is scheduler.curriculum
    assert scheduler.curriculum.progress.stage == 0 and not scheduler.run.monitor.batches


@pytest.mark.parametrize("curriculum", [None, dict(STAGES, windows=[4, 1], teacher="previous"), STAGES])
def test_another_curriculum_is_refused_where_the_original_teacher_is_gone(quick, curriculum):
    stages = dict(STAGES, teacher="previous")
    scheduler, network = PeRFlow(windows=4, curriculum=stages), tiny_network()
    for _ in range(2):
        step(scheduler, network)
    before = scheduler.run.teacher, scheduler.curriculum, scheduler.recipe
    with pytest.raises(
        ValueError, match="taught by the student, as it came to stage 2 .*another curriculum needs a new scheduler"
    ):
        scheduler.__init__(windows=4, curriculum=curriculum)
    assert before == (scheduler.run.teacher, scheduler.curriculum, scheduler.recipe)
    scheduler.__init__(windows=4, curriculum=stages, cfg_scale=2.0)
    assert scheduler.run.teacher is before[0] and scheduler.curriculum is before[1]


def test_only_students_whose_output_is_a_ddim_steps_teach_on_the_ddpm_path(quick):
    network = tiny_network()
    x, args = batch(network)
    scheduler = PeRFlow(path="ddpm", prediction="diff_eps", windows=4, curriculum=dict(STAGES, teacher="previous"))
    with pytest.raises(ValueError, match='prediction="diff_eps" was not trained for; use prediction="ddim_eps"'):
        scheduler.training_losses(network, x, args)


def test_a_student_on_the_ddpm_path_teaches_with_one_ddim_step_a_window(quick):
    """One DDIM step with ddim_eps ends where the student's own window velocity ends."""
    network = Epsilon()
    scheduler = PeRFlow(
        path="ddpm", windows=4, curriculum=dict(STAGES, teacher="previous"), guidance=dict(mode="fixed", scale=1.0)
    )
    seen = watched(scheduler)
    x = torch.randn(2, 4, 5, 4, 4)
    args = {"y": torch.zeros(2, 1, 10, 32), "mask": torch.ones(2, 10, dtype=torch.int64)}
    for _ in range(3):
        scheduler.training_losses(network, x, args)
    segment = seen[-1]
    assert scheduler.curriculum.progress.stage == 1 and len(segment.states) == 3
    path, prediction = scheduler.process_of(network)
    edges = segment.times
    output = stdit.network_output(network, network, conditions.training_condition(Interface.of(network), args))
    student = partial(path.velocity, output, prediction, lambda t: (edges[0], edges[1]))
    with torch.no_grad():
        reached = euler_step(student, segment.states[0], edges[0], edges[1])
    torch.testing.assert_close(segment.states[1], reached, rtol=1e-4, atol=1e-5)  # float32, two ways of writing the step


def test_evaluating_losses_moves_nothing():
    scheduler = PeRFlow(windows=4, curriculum=STAGES)
    with torch.no_grad():
        step(scheduler, tiny_network())
    assert scheduler.curriculum.state()["step"] == 0 and not scheduler.run.monitor.batches


class Resuming(OpenSora):
    """A script that was told to --load a checkpoint."""

    def __init__(self, checkpoint, counted):
        self.checkpoint, self.counted = checkpoint, counted

    def resumed(self):
        return str(self.checkpoint), self.counted


def test_a_resumed_run_goes_on_in_its_stage(tmp_path):
    network, weights = tiny_network(), tmp_path / "teacher" / "original.safetensors"
    weights.parent.mkdir()
    write_state_dict(weights, network.state_dict())
    settings = dict(
        windows=4, curriculum=dict(windows=[4, 2, 1], teacher="previous"), teacher=dict(from_pretrained=str(weights))
    )
    first = PeRFlow(**settings)
    step(first, network)
    first.curriculum.restore({"stage": 1, "step": 3, "best": 0.5, "stale": 2})
    write_state(tmp_path, first.state())
    resumed = PeRFlow(**settings)
    resumed.host = Resuming(tmp_path, counted=True)
    step(resumed, network)
    # Its place in the stage, but no error of the batch that is gone.
    assert resumed.curriculum.state() == {"stage": 1, "step": 4, "best": None, "stale": 0}
    assert resumed.state().windows == first.curriculum.current.edges  # of its stage: the check of changed windows passed
    assert "the student, as it came to stage 2" in resumed.state().teacher_source

    again = PeRFlow(**settings)
    again.host = Resuming(tmp_path, counted=False)  # --start-from-scratch
    with pytest.raises(ValueError, match="windows was .*, now .*allow_change=True"):
        step(again, network)


def test_sizes_of_videos_pass_through_the_held_out_batch():
    network = tiny_network()
    scheduler = PeRFlow(windows=2, curriculum=dict(windows=[2, 1]), use_timestep_transform=True, transform="v1.2")
    x, args = batch(network)
    scheduler.training_losses(network, x, {**args, **sizes(2, num_frames=51, side=512)})
    expected = shift_ratio(sizes(2, num_frames=51, side=512), "v1.2")
    torch.testing.assert_close(scheduler.run.monitor.batches[0].ratio, expected)


# --- config ---


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(windows=4, curriculum=dict()), "curriculum.windows begins with 8 windows, .* are 4; write windows=8"),
        (dict(windows=6, curriculum=dict(windows=[6, 4])), "6 windows cannot be merged evenly into 4"),
        (dict(windows=4, curriculum=dict(windows=[4])), r"two or more descending numbers, got \[4\]"),
        (dict(windows=4, curriculum=dict(windows=[4, 4])), r"two or more descending numbers, got \[4, 4\]"),
        (dict(windows=4, curriculum=dict(windows=4)), "curriculum.windows must be a list of numbers, got 4"),
        (dict(windows=4, curriculum=dict(windows=[4, 0])), "each of curriculum.windows must be an integer >= 1, got 0"),
        (dict(windows=8, curriculum=dict(teacher="ema")), "curriculum.teacher must be one of original, previous, got 'ema'"),
        (dict(windows=8, curriculum="previous"), "curriculum must be a dict or None, got 'previous'; known keys: windows, "),
        (dict(windows=8, curriculum=dict(window=[8, 4])), "did you mean windows"),
        (
            dict(windows=8, curriculum=dict(advance=3)),
            "curriculum.advance must be a dict, got 3; known keys: min_steps, max_steps",
        ),
        (dict(windows=8, curriculum=dict(advance=dict(min_steps=0))), "curriculum.advance.min_steps must be an integer >= 1"),
        (dict(windows=8, curriculum=dict(advance=dict(max_steps=2.5))), "curriculum.advance.max_steps must be an integer >= 1"),
        (
            dict(windows=8, curriculum=dict(advance=dict(max_step=9))),
            "'max_step' in curriculum.advance; did you mean max_steps",
        ),
        (dict(windows=8, curriculum=dict(advance=dict(min_steps=9, max_steps=8))), "min_steps must not exceed max_steps"),
        (dict(windows=8, curriculum=dict(), draws=dict(overlap=0.5)), "use draws.overlap=0 and draws.grids="),
        (dict(windows=8, curriculum=dict(), draws=dict(grids=[5])), "use draws.overlap=0 and draws.grids="),
    ],
)
def test_a_curriculums_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        PeRFlow(**settings)


def test_a_curriculum_survives_copy_and_json():
    config = dict(windows=8, curriculum=dict(windows=[8, 4, 2, 1], teacher="previous", advance=dict(min_steps=10)))
    again, scheduler = PeRFlow(**json.loads(json.dumps(config))), PeRFlow(**config)
    assert (again.recipe, again.keys) == (scheduler.recipe, scheduler.keys)
    assert PeRFlow(**config).recipe.stages().rule.min_steps == 10
