"""What changes from frame to frame: as a loss, as a weight of videos beside images, and as a report."""

import pytest
import torch
from networks import batch, tiny_network

from opensora_perflow import PeRFlow
from opensora_perflow.motion import WindowMotion, motion_report
from opensora_perflow.objectives import WindowPair, combine, counted_frames, perflow, perflow_motion
from opensora_perflow.solvers import solve

F64 = torch.float64


def pair_of(num_frames, batch_size=2):
    start, end = torch.tensor([[1.0, 0.6], [0.6, 0.1]], dtype=F64)[:, :batch_size]
    return WindowPair(*torch.randn(2, batch_size, 3, num_frames, 2, 2), start, end)


def loss_of(error, weights=None, objective=perflow_motion):
    pair = pair_of(error.shape[2], len(error))
    return objective(lambda x, t: pair.velocity + error, pair, pair.t_start, weights)


def by_frame(*values):
    return torch.tensor(values)[None, None, :, None, None].expand(2, 3, -1, 2, 2)


def test_an_error_that_all_frames_share_does_not_count():
    # (v + 5) - v in float32 with v up to 10: a rounding of 1e-6, squared.
    assert loss_of(by_frame(5.0, 5.0, 5.0, 5.0)).max() < 1e-10


def test_errors_count_by_what_changes():
    torch.testing.assert_close(loss_of(by_frame(0.0, 1.0, 3.0, 3.0)), torch.full((2,), (1 + 4 + 0) / 3))
    torch.testing.assert_close(loss_of(by_frame(1.0, -1.0, 1.0)), torch.full((2,), 4.0))
    error = torch.randn(2, 3, 4000, 2, 2)
    # 48000 independent errors: the mean of their squares is known to 1 %, five standard errors are 5 %.
    torch.testing.assert_close(loss_of(error), 2 * loss_of(error, objective=perflow), rtol=0.05, atol=0)


def test_a_difference_counts_where_both_frames_do():
    error = by_frame(100.0, 1.0, 4.0, -50.0, 2.0)
    weights = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]])
    expected = torch.tensor([9.0, (99**2 + 9 + 54**2 + 52**2) / 4])
    torch.testing.assert_close(loss_of(error, weights), expected)
    # A weight between 0 and 1 (x_cond_weight): the smaller of both frames'.
    weights = torch.tensor([[1.0, 1.0, 0.5], [0.5, 2.0, 2.0]])
    torch.testing.assert_close(
        loss_of(by_frame(0.0, 1.0, 3.0), weights), torch.tensor([(1 + 0.5 * 4) / 1.5, (0.5 + 2 * 4) / 2.5])
    )


@pytest.mark.parametrize("weights", [None, torch.ones(2, 1), torch.zeros(2, 1)])
def test_images_have_no_loss_and_a_gradient_of_zero(weights):
    bias = torch.ones((), requires_grad=True)
    pair = pair_of(1)
    loss = perflow_motion(lambda x, t: pair.velocity + bias, pair, pair.t_start, weights)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and bias.grad == 0 and loss.dtype == torch.float32


def test_what_is_no_video_is_refused():
    pair = WindowPair(torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64))
    with pytest.raises(ValueError, match=r"perflow_motion needs videos \[B, C, T, H, W\], got \[2, 3\]"):
        perflow_motion(lambda x, t: x, pair, pair.t_start)


def test_it_is_added_to_perflow_for_one_evaluation():
    pair, calls = pair_of(4), []

    def student(x, t):
        calls.append(t)
        return pair.velocity + by_frame(0.0, 1.0, 3.0, 3.0)

    both = combine([dict(type="perflow"), dict(type="perflow_motion", weight=0.5)])(student, pair, pair.t_start)
    torch.testing.assert_close(both, torch.full((2,), 19 / 4 + 0.5 * 5 / 3))
    assert len(calls) == 1


def test_the_scheduler_trains_with_it_on_videos_and_images():
    network = tiny_network().train()
    objective = [dict(type="perflow"), dict(type="perflow_motion", weight=0.5)]
    scheduler = PeRFlow(objective=objective, guidance=dict(mode="fixed", scale=3.0), teacher=dict(steps_per_window=2))
    x, args = batch(network)
    mask = torch.tensor([[True] * 5, [False, False] + [True] * 3])
    for latents, frame_mask in ((x, None), (x, mask), (x[:, :, :1], None), (x[:, :, :1], mask[:, :1])):
        loss = scheduler.training_losses(network, latents, args, mask=frame_mask)["loss"]
        loss.mean().backward()
        assert torch.isfinite(loss).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in network.parameters())


# --- images and videos in one training ---


def test_frames_that_count():
    x = torch.zeros(2, 3, 4, 2, 2)
    assert counted_frames(x, None).tolist() == [4, 4]
    assert counted_frames(x, torch.tensor([[0, 0, 1, 1], [0.5, 2, 0, 1]])).tolist() == [2, 3]


def test_every_frame_counts_alike():
    network = tiny_network()
    mask = torch.tensor([[True] * 5, [False, False] + [True] * 3])
    x, args = batch(network)

    def loss(latents, frame_mask, **settings):
        scheduler = PeRFlow(**settings)
        scheduler._objective = lambda student, pair, t, weights: torch.ones(2)
        return scheduler.training_losses(network, latents, args, mask=frame_mask)["loss"].tolist()

    assert loss(x, None) == loss(x[:, :, :1], None) == [1, 1]
    assert loss(x, None, frames_of_weight_one=5) == [1, 1]
    assert loss(x[:, :, :1], None, frames_of_weight_one=5) == pytest.approx([0.2, 0.2])
    assert loss(x, mask, frames_of_weight_one=2.5) == pytest.approx([2, 1.2])


# --- the report ---


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
