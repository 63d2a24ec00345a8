"""What changes from frame to frame, as a report."""

import pytest
import torch

from opensora_perflow.method.motion import WindowMotion, motion_report
from opensora_perflow.method.solvers import solve

F64 = torch.float64


def test_the_report_of_straight_flows_is_exact():
    noise, data = torch.randn(2, 2, 3, 5, 2, 2)
    edges = torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=F64)
    states = [noise]
    for t, t_end in zip(edges, edges[1:]):
        states.append(solve(lambda x, t: noise - data, states[-1], torch.stack([t, t_end])[:, None].expand(2, 2)))
    still = data.mean(dim=2, keepdim=True)  # the student shows the same video, a quarter as fast
    report = motion_report(lambda x, t: noise - (still + (data - still) / 2), states, edges)
    energy = data.diff(dim=2).square().mean().item()
    for k, row in enumerate(report):
        # x - t v = data where x is on the line to data; the student's misses x by (t) of the difference
        t = edges[k].item()
        slow = data + t * ((still + (data - still) / 2) - data)
        assert row.teacher == pytest.approx(energy, rel=1e-4)
        assert row.student == pytest.approx(slow.diff(dim=2).square().mean().item(), rel=1e-4)
        assert row.error == pytest.approx(t**2 * energy / 4, rel=1e-4)
    assert report[0].student == pytest.approx(energy / 4, rel=1e-4)


def test_the_teachers_own_window_velocity_loses_no_motion():
    states, edges = list(torch.randn(3, 2, 3, 5, 2, 2)), torch.tensor([1.0, 0.4, 0.0], dtype=F64)

    def student(x, t):
        k = 0 if t[0] == 1 else 1
        return (states[k + 1] - states[k]) / (edges[k + 1] - edges[k]).float()

    for row in motion_report(student, states, edges[:, None].expand(3, 2)):
        assert row.student == pytest.approx(row.teacher, rel=1e-5) and row.error < 1e-9


def test_images_do_not_move():
    states, edges = list(torch.randn(2, 2, 3, 1, 2, 2)), torch.tensor([1.0, 0.0], dtype=F64)
    assert motion_report(lambda x, t: x, states, edges) == [WindowMotion(0.0, 0.0, 0.0)]


def test_a_missing_state_is_refused():
    with pytest.raises(ValueError, match="state at each edge, got 1 states, 2 edges"):
        motion_report(lambda x, t: x, [torch.zeros(2, 3, 1, 2, 2)], torch.tensor([1.0, 0.0], dtype=F64))
