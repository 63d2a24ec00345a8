"""Students of Open-Sora 2.0 that are told where their step ends: what the network is told in training and sampling."""

from __future__ import annotations

import pytest
import torch
from mmdit import FEATURES, arguments, compare, hooked, note_nulls, positions
from test_v2_sampling import ALPHA, sampled_with, schedule, trained_state

from opensora_perflow.hosts.scale_input import direction, told
from opensora_perflow.hosts.v2.denoiser import StudentDenoiser
from opensora_perflow.hosts.v2.sampling import step_at

FIXED = dict(guidance=dict(mode="fixed", scale=3.0), watch=None, windows=4)
DRAWS = dict(grids=[1, 2], two_time=True, seed=3)
TOWARD = direction(FEATURES, 1).float()


@pytest.fixture(autouse=True)
def nulls(monkeypatch):
    return note_nulls(monkeypatch)


def spied(network):
    """What each evaluation is told: a list of (times [B], lengths of steps [B]). A timestep uses the first feature alone."""
    seen, inner = [], network.time_in.forward

    def forward(features):
        lengths = features @ TOWARD / TOWARD.square().sum()
        torch.testing.assert_close(features[:, 1:], (lengths[:, None] * TOWARD)[:, 1:])
        seen.append((features[:, 0].detach(), lengths.detach()))
        return inner(features)

    network.time_in.forward = forward
    return seen


def test_a_step_of_no_length_is_the_network_as_it_was():
    network, _ = hooked(FIXED)
    given, _ = arguments()
    plain = network.eval()(**given)
    with told(network, step=torch.tensor([0.0, 0.5])):
        said = network(**given)
    assert torch.equal(said[0], plain[0]) and not torch.allclose(said[1], plain[1])


def test_training_tells_the_way_to_the_end_of_the_window():
    """The script's own call, whose rows are two times a sample; and the walk to the window, one step of its grid each."""
    network, hooks = hooked({**FIXED, "draws": DRAWS})
    seen, lengths, batches = spied(network), set(), []
    network.register_forward_pre_hook(lambda *_: batches.append(hooks._step[1]))
    given, target = arguments()
    for _ in range(8):
        seen.clear()
        compare(network(**given), target).backward()
        drawn = batches[-1].drawn
        t, length = seen[-1]
        assert torch.equal(t, drawn.times.flatten().float())
        # float32's rounding of a sum of 32 products
        torch.testing.assert_close(length, (drawn.times - drawn.t_end).flatten().float(), atol=1e-6, rtol=0)
        for t, length in seen[:-1]:  # the walk: of some of the samples, each at an edge of its route
            for one, step in zip(t.tolist(), length.tolist()):
                starts = (drawn.route[:-1].float() - one).abs()
                assert min(abs((drawn.route[:-1] - drawn.route[1:])[starts < 1e-6].float() - step)) < 1e-6
        lengths |= {round(float(step), 4) for step in drawn.t_start - drawn.t_end}
        assert not network.time_in._forward_pre_hooks[next(iter(network.time_in._forward_pre_hooks))].moved
    assert len(lengths) >= 3  # of windows and both grids


def test_an_untrained_student_that_does_not_listen_is_the_plain_one():
    """With zeros where lengths enter: the same losses, to the last bit."""
    losses = []
    for two_time in (True, False):
        network, hooks = hooked({**FIXED, "draws": {**DRAWS, "two_time": two_time}})
        for one in (network, hooks.host.built):
            one.time_in.weight.data[:, TOWARD != 0] = 0
        given, target = arguments()
        losses.append(torch.stack([compare(network(**given), target) for _ in range(4)]))
    assert torch.equal(*losses)


def test_the_teacher_is_told_nothing():
    network, hooks = hooked({**FIXED, "draws": DRAWS})
    seen = spied(hooks.host.built)
    given, target = arguments()
    compare(network(**given), target)
    assert seen and all(not length.any() for _, length in seen)


class Euler:
    """The loop of Open-Sora's denoisers, with as many equal rows as I2VDenoiser has."""

    def denoise(self, model, img, timesteps, rows, **given):
        given = {name: value for name, value in given.items() if name not in ("guidance_img", "masks", "guidance")}
        for t, after in zip(timesteps[:-1], timesteps[1:]):
            times = torch.full((rows * len(img),), t, dtype=img.dtype)
            more = {name: value.repeat(rows, *[1] * (value.dim() - 1)) for name, value in given.items()}
            img = img + (after - t) * model(img=img.repeat(rows, 1, 1), timesteps=times, **more)[: len(img)]
        return img


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampling_tells_each_step_its_length(steps, rows):
    network, _ = hooked({**FIXED, "draws": DRAWS, "flow_shift": ALPHA})
    given, _ = arguments()
    seen = spied(network.eval())
    given |= {"timesteps": schedule(steps), "rows": rows, "guidance": 3.0, "img_ids": positions()}
    given |= {"guidance_img": 1.0, "masks": torch.zeros(1)} if rows == 3 else {}
    with torch.no_grad():
        StudentDenoiser(Euler(), None).denoise(network, **given)
    times = torch.tensor(schedule(steps))
    assert len(seen) == steps and all(len(t) == 2 for t, _ in seen)
    torch.testing.assert_close(torch.stack([t for t, _ in seen]), times[:-1, None].expand(-1, 2), atol=1e-6, rtol=0)
    expected = (times[:-1] - times[1:])[:, None].expand(-1, 2)
    torch.testing.assert_close(torch.stack([length for _, length in seen]), expected, atol=1e-6, rtol=0)  # float32


def test_times_that_were_rounded_are_found():
    times = schedule(50)
    t = torch.tensor(times[:-1])
    expected = t.double() - torch.tensor(times[1:], dtype=torch.float32).double()
    torch.testing.assert_close(step_at(times, t.bfloat16()), expected, atol=1e-6, rtol=0)


def test_a_trained_student_is_sampled_as_it_was_told(tmp_path):
    trained_state(tmp_path / "epoch0-global_step4", {**FIXED, "draws": DRAWS})
    settings = sampled_with(tmp_path / "epoch0-global_step4")
    assert settings.two_time and settings.grids == (1, 2)
    trained_state(tmp_path / "plain", FIXED)
    assert not sampled_with(tmp_path / "plain").two_time
