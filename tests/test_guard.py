"""The guard's rules on made-up steps whose answer is known, and a run that it watches."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from networks import batch, tiny_network

from opensora_perflow import PeRFlow
from opensora_perflow.hosts.optimizer import kept, rate_of, scale_rates
from opensora_perflow.hosts.v1.host import OpenSora
from opensora_perflow.training.guard import FIRST, LAST, Breach, Guard
from opensora_perflow.training.record import read_record
from opensora_perflow.training.remedies import KEEP_EVERY, Remedies
from opensora_perflow.training.vitals import Vitals, WeightSample, motion

EDGES = (1.0, 0.5, 0.0)


def seen(**changes):
    """A healthy step with a sample in each of two windows."""
    ones = ("mean", "std", "motion", "own_mean", "own_std", "own_motion", "data_std", "data_motion")
    healthy = {name: [1.0, 1.0] for name in ones} | {"loss": [0.5, 0.2], "window": [0, 1], "misplaced": [0.0, 0.0]}
    healthy |= {"num_windows": 2, "grad_norm": 1.0, "update": 1e-3, "ema_update": 1e-5, "teacher_update": 0.0}
    return Vitals(**{**healthy, **changes})


def causes(*parts):
    """Causes and windows that a guard names in (number of steps, changes of each)."""
    guard, found, step = Guard(EDGES), [], 0
    for count, changes in parts:
        for _ in range(count):
            found += [(breach.cause, breach.window) for breach in guard.observe(step, seen(**changes))]
            step += 1
    return found


def test_a_healthy_run_is_left_alone():
    assert causes((200, {})) == []


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"loss": [0.5, 0.7]}, ("learning rate", 1)),  # 3.5 times
        ({"own_std": [0.3, 1.0]}, ("collapse", 0)),
        ({"own_std": [1.0, 2.5]}, ("learning rate", 1)),
        ({"own_motion": [0.2, 1.0]}, ("collapse", 0)),
        ({"misplaced": [0.0, 1.0]}, ("window lookup", 1)),
        ({"loss": [0.0, 0.2]}, ("zero loss", 0)),
        ({"ema_update": 0.0}, ("dead EMA", None)),
        ({"teacher_update": 1e-4}, ("student as teacher", None)),
        ({"teacher_trains": True}, ("teacher in train mode", None)),
        ({"update": 0.08}, ("learning rate", None)),
        ({"data_std": [1.0, 0.05]}, ("blank data", None)),
        ({"data_motion": [1e-5, 0.0]}, ("static latents", None)),
    ],
)
def test_each_fault_is_named_once(changes, named):
    assert causes((FIRST, {}), (30, changes)) == [named]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": [1.4, 0.5]},  # less than three times
        {"loss": [0.05, 0.02]},
        {"own_std": [0.6, 1.8]},
        {"own_motion": [math.nan, math.nan]},  # one frame
        {"ema_update": math.nan},  # no EMA is known
        {"ema_update": 0.0, "update": 1e-6},  # nothing that an average could follow
        {"data_std": [0.0, 0.0], "data_motion": [0.0, 0.0]},  # a run without videos
    ],
)
def test_what_healthy_runs_show_is_no_fault(changes):
    first = changes if "data_std" in changes else {}
    assert causes((FIRST, first), (30, changes)) == []


def test_weights_that_move_by_half_of_their_length_are_named_at_once():
    assert causes((1, {}), (1, {"update": 0.6})) == [("learning rate", None)] and causes((1, {}), (1, {"update": 0.3})) == []


def test_a_run_that_went_back_is_not_blamed_for_what_was_before():
    guard = Guard(EDGES)
    for step in range(20):
        guard.observe(step, seen(update=0.2, loss=[0.5 + step, 0.2]))
    guard.go_back()
    assert [breach for step in range(20, 50) for breach in guard.observe(step, seen())] == []


def test_a_window_that_is_rarely_drawn_waits_for_its_steps():
    one = {"loss": [5.0, 5.0], "window": [1, 1]}
    assert causes((FIRST, {}), (LAST - 1, one)) == [] and causes((FIRST, {}), (LAST, one)) == [("learning rate", 1)]


def test_motion_is_the_mean_square_of_differences_in_time():
    x = torch.arange(3.0).reshape(1, 1, 3, 1, 1).expand(2, 4, 3, 2, 2) * torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1, 1)
    assert motion(x).tolist() == [1.0, 4.0] and motion(x[:, :, :1]).isnan().all()


def test_a_sample_of_weights_tells_how_far_all_of_them_move():
    network = torch.nn.Linear(8, 8)
    sample = WeightSample(network, gradients=True)
    assert sample.moved() == 0.0 and sample.gradient_norm().isnan()
    network(torch.ones(1, 8)).sum().backward()
    total = sum(p.grad.square().sum() for p in network.parameters()).sqrt()
    torch.testing.assert_close(sample.gradient_norm(), total)  # 72 weights are all of them
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 1.25
    assert sample.moved().item() == pytest.approx(0.25, rel=1e-5)


# --- through the scheduler ---


def test_a_step_is_not_measured_where_nobody_reads_it():
    network = tiny_network().train()
    x, args = batch(network)
    for watch, measured in ((None, False), ({}, True)):
        scheduler = PeRFlow(watch=watch)
        scheduler.training_losses(network, x, args)
        assert scheduler.run.observer.measures == measured == (scheduler.run.observer.instruments is not None)


class Script(OpenSora):
    """A script with an optimizer and a folder."""

    def __init__(self, folder, student, rate=0.01):
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
        self.student, self.place = student, folder
        self.folder = lambda: self.place
        self.rate = lambda: rate_of(self.optimizer)
        self.scale_rate = lambda factor: scale_rates(factor, self.optimizer)
        self.keep_state = lambda: kept([self.student], self.optimizer)


def train(scheduler, student, script, steps):
    torch.manual_seed(1)
    for _ in range(steps):
        x, args = batch(student)
        script.optimizer.zero_grad()
        scheduler.training_losses(student, x, args)["loss"].mean().backward()
        script.optimizer.step()


def test_a_run_keeps_a_record(tmp_path):
    student = tiny_network().train()
    scheduler = PeRFlow(windows=2, watch=dict(every=2))
    scheduler.host = script = Script(tmp_path, student)
    train(scheduler, student, script, 4)
    lines = read_record(tmp_path)
    assert [line["kind"] for line in lines] == ["begin", "step", "step", "held_out", "step", "held_out", "step"]
    begin, steps = lines[0], [line for line in lines if line["kind"] == "step"]
    assert begin["windows"] == [1.0, 0.5, 0.0] and begin["recipe"]["watch"]["policy"] == "warn"
    assert [line["step"] for line in steps] == [0, 1, 2, 3] and steps[0]["rate"] == 0.01
    for line in steps:
        counts, losses = line["window_count"], line["window_loss"]
        mean = sum(count * loss for count, loss in zip(counts, losses) if count) / sum(counts)
        assert sum(counts) == 2 and line["loss"] == pytest.approx(mean, rel=1e-4)  # six digits are written
    assert steps[0]["grad_norm"] is None and steps[1]["grad_norm"] > 0 and steps[1]["update"] > 0
    assert steps[0]["ema_update"] is None


def test_observing_changes_no_step():
    """Losses to the last bit, whatever is measured beside them."""
    losses = []
    for watch in (None, dict(policy="rollback")):
        student = tiny_network().train()
        scheduler = PeRFlow(windows=2, watch=watch, draws=dict(seed=0))
        scheduler.host = script = Script(None, student)
        train(scheduler, student, script, 3)
        losses.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    assert torch.equal(*losses)


def spoiled(policy, tmp_path, caplog):
    """A run of 60 steps whose rate rises at step 52: the weights of step 25, and those at the end."""
    student = tiny_network().train()
    scheduler = PeRFlow(windows=2, watch=dict(every=1000, policy=policy), draws=dict(seed=0))
    scheduler.host = script = Script(tmp_path, student, rate=1e-4)
    train(scheduler, student, script, KEEP_EVERY)
    good = [p.detach().clone() for p in student.parameters()]
    train(scheduler, student, script, 27)
    scale_rates(3000.0, script.optimizer)
    with caplog.at_level(logging.WARNING, logger="opensora_perflow"):
        train(scheduler, student, script, 8)
    return scheduler, student, script, good


def test_rollback_puts_weights_and_rate_back(tmp_path, caplog):
    scheduler, student, script, good = spoiled("rollback", tmp_path, caplog)
    put_back = [line for line in read_record(tmp_path) if line["kind"] == "rollback"]
    assert [line["to"] for line in put_back] == [KEEP_EVERY]
    assert script.rate() == pytest.approx(0.5e-4)
    # Back at step 25, and trained on at half the rate for a few steps: each moves a weight by the rate at most (Adam).
    steps = 60 - put_back[0]["step"]
    for now, then in zip(student.parameters(), good):
        assert (now.detach() - then).abs().max() <= 1.5 * steps * 0.5e-4


@pytest.mark.parametrize("spoiled", [[3], [3, 4]])
def test_weights_that_are_not_finite_are_put_back(tmp_path, spoiled):
    """Unless the next step breaks them again: then the run ends, and names them."""
    student = tiny_network().train()
    scheduler = PeRFlow(windows=2, watch=dict(every=1000, policy="rollback"), draws=dict(seed=0))
    scheduler.host = script = Script(tmp_path, student, rate=1e-4)
    optimize, steps = script.optimizer.step, iter(range(9))

    def spoil():
        if next(steps) in spoiled:
            for gradient in filter(torch.is_tensor, [parameter.grad for parameter in student.parameters()]):
                gradient.fill_(math.nan)
        optimize()

    script.optimizer.step = spoil
    if len(spoiled) == 1:
        train(scheduler, student, script, 9)
        assert all(bool(p.isfinite().all()) for p in student.parameters())
    else:
        with pytest.raises(ValueError, match="the student .* returned NaN or infinity.* of its weights are not finite"):
            train(scheduler, student, script, 9)
    breach, back = (line for line in read_record(tmp_path) if line["kind"] in ("breach", "rollback"))
    assert breach["cause"] == "broken weights" and back["to"] == 0 and script.rate() == pytest.approx(0.5e-4)


def test_weights_that_are_gathered_late_are_waited_for():
    """As v1.3 boosts: the last step's arrive while the next forward runs."""
    student, late = tiny_network().train(), []

    class Boosted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = student

        def _force_wait_all_gather(self):
            while late:
                late.pop().detach().fill_(math.nan)

        def forward(self, *inputs, **named):
            self._force_wait_all_gather()
            return student(*inputs, **named)

    scheduler, boosted = PeRFlow(watch=dict(policy="rollback")), Boosted()
    scheduler.host = Script(None, student)
    scheduler.training_losses(boosted, *batch(student))
    late += student.parameters()
    scheduler.training_losses(boosted, *batch(student))
    assert all(bool(p.isfinite().all()) for p in student.parameters())


def test_rollback_lowers_the_rate_where_nothing_is_kept_yet():
    rates = []
    remedies = Remedies(
        "rollback", SimpleNamespace(mean=lambda value, device: value, device=lambda: "cpu", scale_rate=rates.append), None
    )
    remedies.note(Breach("learning rate", "too high", curable=True))
    assert remedies.act(1) is None and rates == [0.1]


def test_stop_ends_the_run_with_the_cause(tmp_path, caplog):
    with pytest.raises(ValueError, match=r'stopped before training step 5\d \(watch.policy="stop"\).*learning rate'):
        spoiled("stop", tmp_path, caplog)


def test_a_copy_of_a_state_puts_everything_back():
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)

    def step():
        network(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    put_back, first = kept([network], optimizer), None
    ends = []
    for _ in range(2):
        step()
        step()
        ends.append(network.weight.detach().clone())
        first = first or put_back()
        put_back()
    assert torch.equal(*ends)  # moments and Adam's count of steps included
