import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from measures import velocity_jump
from problems import Constant, Gaussian
from torch import nn

from opensora_perflow.conventions import expand_like
from opensora_perflow.method.grids import linear_grid
from opensora_perflow.method.segment import Segment
from opensora_perflow.method.solvers import remember_last, solve, states
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.objectives import (
    combine,
    mean_over_frames,
    perflow,
    perflow_consistency,
    perflow_direction,
    perflow_phased,
)
from opensora_perflow.registry import OBJECTIVES

F64 = torch.float64


@pytest.fixture
def segment():
    start, end = torch.tensor([[1.0, 0.6], [0.6, 0.1]], dtype=F64)
    return Segment(torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2), start, end)


def test_the_line_ends_at_the_edges(segment):
    torch.testing.assert_close(segment.point(segment.t_start), segment.x_start, atol=0, rtol=0)
    torch.testing.assert_close(segment.point(segment.t_end), segment.x_end)  # float32: x + (y - x)


def test_the_right_velocity_has_no_loss_and_no_gradient(segment):
    bias = torch.zeros((), requires_grad=True)
    loss = perflow(lambda x, t: segment.velocity + bias, segment, segment.t_start)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and bias.grad == 0


def test_a_constant_error_counts_squared(segment):
    loss = perflow(lambda x, t: segment.velocity + 0.5, segment, segment.t_start)
    torch.testing.assert_close(loss, torch.full((2,), 0.25))
    assert loss.dtype == torch.float32 and loss.shape == (2,)


def test_masked_frames_neither_count_nor_dilute():
    error = torch.zeros(2, 3, 4, 2, 2)
    error[:, :, 0] = 100.0
    error[:, :, 1:] = 2.0
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    torch.testing.assert_close(mean_over_frames(error, mask), torch.tensor([2.0, 26.5]))
    assert mean_over_frames(error, torch.zeros(2, 4)).tolist() == [0.0, 0.0]


class AffineWindows(nn.Module):
    """The family that holds the answer: on each window x_end = ratio x_start + shift, both learned."""

    def __init__(self, windows: TimeWindows) -> None:
        super().__init__()
        self.windows = windows
        self.ratio = nn.Parameter(torch.ones(windows.num_windows, dtype=F64))
        self.shift = nn.Parameter(torch.zeros(windows.num_windows, dtype=F64))

    def forward(self, x, t):
        idx = self.windows.lookup(t)
        start, end = self.windows.bounds(idx)
        ratio, shift, done = (v[:, None] for v in (self.ratio[idx], self.shift[idx], (t - start) / (end - start)))
        x_start = (x - done * shift) / (1 + done * (ratio - 1))
        return ((ratio - 1) * x_start + shift) / (end - start)[:, None]


def test_training_on_a_gaussian_teacher_converges_to_the_closed_form():
    teacher, windows = Gaussian(), TimeWindows((1.0, 0.7, 0.3, 0.0))
    student = AffineWindows(windows)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        u = torch.rand(256, dtype=F64)
        start, end = windows.bounds(windows.lookup(u))
        data = teacher.m + teacher.s * torch.randn(256, 1, dtype=F64)
        x_start = (1 - start)[:, None] * data + start[:, None] * torch.randn(256, 1, dtype=F64)
        with torch.no_grad():
            x_end = solve(teacher, x_start, linear_grid(start, end, 16), method="heun")
        optimizer.zero_grad()
        perflow(student, Segment(x_start, x_end, start, end), u).mean().backward()
        optimizer.step()
    u = torch.linspace(0.01, 1, 50, dtype=F64)
    start, end = windows.bounds(windows.lookup(u))
    x_t = (1 - u)[:, None] * teacher.m + teacher.std(u)[:, None] * torch.randn(50, 1, dtype=F64)
    # 16 Heun steps across a window leave 4e-4 of error in the target (measured against the flow map, order 2); the
    # optimum has no loss left, so the optimiser adds nothing that counts.
    exact = teacher.window_velocity(x_t, u, start, end)
    torch.testing.assert_close(student(x_t, u).detach(), exact, atol=2e-3, rtol=0)


def middle(segment):
    return (segment.t_start + segment.t_end) / 2


@pytest.mark.parametrize("objective", [perflow_direction, perflow_phased])
def test_every_objective_is_least_at_the_windows_velocity(objective, segment):
    bias = torch.zeros((), requires_grad=True)
    loss = objective(lambda x, t: segment.velocity + bias, segment, middle(segment))
    loss.sum().backward()
    # The cosine of a vector with itself is 1 up to the rounding of three float32 sums; the others are exactly 0.
    assert loss.abs().max() < 1e-6 and bias.grad.abs() < 1e-6 and loss.dtype == torch.float32


def test_direction_is_the_angle_whatever_the_length(segment):
    across = torch.randn_like(segment.velocity)
    dots = ((across * segment.velocity).flatten(1).sum(1) / segment.velocity.square().flatten(1).sum(1)).reshape(-1, 1, 1, 1, 1)
    across = across - dots * segment.velocity
    across *= (segment.velocity.flatten(1).norm(dim=1) / across.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1, 1)
    for angle, length in ((0.0, 3.0), (0.3, 0.1), (1.5, 1.0), (3.0, 5.0)):
        turned = length * (math.cos(angle) * segment.velocity + math.sin(angle) * across)
        loss = perflow_direction(lambda x, t, v=turned: v, segment, middle(segment))
        torch.testing.assert_close(loss, torch.full((2,), 1 - math.cos(angle)), atol=2e-6, rtol=0)  # float32 sums of 48


def test_direction_leaves_out_masked_frames(segment):
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    wrong = segment.velocity.clone()
    wrong[0, :, 0] = -7.0
    loss = perflow_direction(lambda x, t: wrong, segment, middle(segment), mask.float())
    torch.testing.assert_close(loss, torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("place", [1.0, 0.5, 0.1])
def test_the_phased_loss_is_the_error_at_the_windows_end(segment, place):
    t = segment.t_end + place * (segment.t_start - segment.t_end)
    loss = perflow_phased(lambda x, t: segment.velocity + 0.5, segment, t)
    torch.testing.assert_close(loss, torch.full((2,), 0.25 * place**2))
    # The form in which the paper writes it: one step to the clean edge against the teacher's state there.
    step = (segment.t_end - t).float().reshape(-1, 1, 1, 1, 1)
    ends = segment.point(t) + step * (segment.velocity + 0.5)
    length = (segment.t_start - segment.t_end).float().reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(loss, (((ends - segment.x_end) / length) ** 2).flatten(1).mean(1), rtol=1e-4, atol=1e-7)


def gaussian_path(teacher, steps=16):
    """Exact states of a Gaussian's flow on a grid inside two different windows: [S + 1, B, 1]."""
    start, end = torch.tensor([[1.0, 0.6], [0.6, 0.1]], dtype=F64)
    times = linear_grid(start, end, steps)
    x = teacher.std(start)[:, None] * torch.randn(2, 1, dtype=F64) + (1 - start)[:, None] * teacher.m
    path = torch.stack([teacher.exact(x, start, t) for t in times])
    return Segment(path[0], path[-1], start, end, path, times)


@pytest.mark.parametrize("target", ["student", "solution"])
@pytest.mark.parametrize("place", [1.0, 0.7, 0.31, 0.01])
def test_a_student_that_knows_the_flow_is_consistent(target, place):
    teacher = Gaussian()
    segment = gaussian_path(teacher)

    def student(x, t):  # the mean velocity to the window's end: what consistency asks for
        rest = segment.t_end - t
        exact = (teacher.exact(x, t, segment.t_end) - x) / rest.where(rest != 0, torch.ones_like(rest))[:, None]
        return exact

    loss = perflow_consistency(student, segment, segment.t_end + place * (segment.t_start - segment.t_end), target=target)
    assert loss.max() < 1e-12  # float64 algebra, returned as float32


def test_a_constant_error_is_inconsistent_by_the_step_it_is_made_in():
    segment = gaussian_path(Gaussian(), steps=4)

    def student(x, t):
        rest = segment.t_end - t
        return (Gaussian().exact(x, t, segment.t_end) - x) / rest.where(rest != 0, torch.ones_like(rest))[:, None] + 0.5

    length = segment.t_start - segment.t_end
    for place, i in ((1.0, 0), (0.76, 0), (0.75, 1), (0.1, 3)):
        t = segment.t_end + place * length
        # f is off by 0.5 times the rest of the window: neighbours differ by a quarter of it, the solution by all of it.
        loss = perflow_consistency(student, segment, t)
        torch.testing.assert_close(loss, torch.full((2,), (0.5 / 4) ** 2))
        loss = perflow_consistency(student, segment, t, target="solution")
        torch.testing.assert_close(loss, torch.full((2,), (0.5 * (1 - i / 4)) ** 2))


def test_consistency_takes_no_gradient_through_its_target():
    segment, gain = gaussian_path(Gaussian(), steps=2), torch.ones((), requires_grad=True, dtype=F64)
    calls = []

    def student(x, t):
        calls.append(torch.is_grad_enabled())
        return gain * x

    perflow_consistency(student, segment, segment.t_start).sum().backward()
    assert calls == [False, True] and gain.grad != 0


def test_consistency_says_what_it_needs(segment):
    with pytest.raises(ValueError, match="needs the teacher's states inside the window"):
        perflow_consistency(Constant(), segment, segment.t_start)
    with pytest.raises(ValueError, match="unknown target 'teacher' of perflow_consistency; known: student, solution"):
        perflow_consistency(Constant(), segment, segment.t_start, target="teacher")


@pytest.mark.parametrize(
    "value, message",
    [
        (dict(type="of_ones_own", c=0), "'of_ones_own' does not take {'c': 0}: c must be > 0"),
        (dict(type="of_ones_own", c="x"), "'of_ones_own' does not take {'c': 'x'}"),
        (["perflow", dict(type="perflow_consistency", target="nope")], "unknown target 'nope'"),
    ],
)
def test_keywords_are_refused_before_there_is_a_teacher(value, message, monkeypatch):
    def of_ones_own(student, segment, t, frame_weights=None, *, c=1.0):
        if not c > 0:
            raise ValueError("c must be > 0")
        return c * perflow(student, segment, t, frame_weights)

    monkeypatch.setitem(OBJECTIVES.module_dict, "of_ones_own", of_ones_own)
    with pytest.raises(ValueError, match=message):
        combine(value)


def test_weighted_objectives_add_up_with_one_evaluation(segment):
    student = Constant(0.3)
    t = middle(segment)
    both = combine([dict(type="perflow", weight=2.0), dict(type="perflow_direction", weight=0.1), "perflow_phased"])
    loss = both(student, segment, t)
    assert student.calls == 1
    square, angle, phased = (f(student, segment, t) for f in (perflow, perflow_direction, perflow_phased))
    torch.testing.assert_close(loss, 2 * square + 0.1 * angle + phased)
    torch.testing.assert_close(combine("perflow")(student, segment, t), perflow(student, segment, t), rtol=0, atol=0)


def test_an_evaluation_is_remembered_for_the_same_state_time_and_graph_alone():
    field = Constant()
    remembering = remember_last(field)
    x, t = torch.randn(2, 3), torch.tensor([0.5, 0.6])
    remembering(x, t), remembering(x.clone(), t.clone())
    assert field.calls == 1
    with torch.no_grad():
        remembering(x, t)
    remembering(x, t)
    remembering(x, t + 0.1)
    remembering(x + 1, t)
    assert field.calls == 5


def test_a_solution_is_the_last_of_its_states():
    times = linear_grid(torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64), 5)
    x = torch.randn(2, 3, dtype=F64)
    path = list(states(Gaussian(), x, times, method="heun"))
    assert len(path) == 6 and path[0] is x
    torch.testing.assert_close(path[-1], solve(Gaussian(), x, times, method="heun"), rtol=0, atol=0)


class PiecewiseLinear:
    """v = a_k x + b_k t in window k: a field whose jump across an edge is known."""

    windows = TimeWindows((1.0, 0.6, 0.1, 0.0))
    a, b = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.25, -0.5]], dtype=F64)

    def __call__(self, x, t):
        k = self.windows.lookup(t)
        return expand_like(self.a[k], x) * x + expand_like(self.b[k] * t, x)


def test_the_jump_of_a_piecewise_linear_field_is_its_own():
    field, x = PiecewiseLinear(), torch.randn(2, 3, 4, 2, 2)
    t, delta = torch.tensor([0.6, 0.1], dtype=F64), 0.01
    a, b = field.a, field.b
    jump = expand_like(a[:2] - a[1:], x) * x + expand_like((b[:2] - b[1:]) * t + b[:2] * delta, x)
    assert velocity_jump(field, x, t, delta) == pytest.approx(jump.square().mean().sqrt().item(), rel=1e-5)  # float32


def test_losses_are_in_units_of_the_networks_output(segment):
    """Where the network outputs something else, an error of its output counts the same at every time; angles have no units."""
    ends, edges = torch.stack([segment.x_start, segment.x_end]), torch.stack([segment.t_start, segment.t_end])
    segment = replace(segment, states=ends, times=edges)
    told = replace(segment, units=lambda t: 1 / (2 + 10 * t))  # velocity = (2 + 10 t) output

    def off(output_error):
        return lambda x, t: segment.velocity + expand_like((2 + 10 * t) * output_error, x)

    t = middle(segment)
    for objective, expected in (
        (perflow, 0.3**2),
        (perflow_phased, 0.3**2 / 4),
        (partial(perflow_consistency, target="solution"), 0.3**2),  # evaluated at the noisy edge
    ):
        assert objective(off(0.3), told, t).tolist() == pytest.approx([expected] * 2, rel=1e-3)
    torch.testing.assert_close(perflow_direction(off(0.3), told, t), perflow_direction(off(0.3), segment, t), rtol=0, atol=0)
