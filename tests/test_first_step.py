"""What can be seen before a run's first step: a teacher that does not go with the data, and a student that cannot learn."""

import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import Epsilon, batch, tiny_network
from torch import nn

from opensora_perflow import PeRFlow
from opensora_perflow.method.ddpm import DDPM
from opensora_perflow.method.process import Linear
from opensora_perflow.training.first_step import Fit, check_teacher
from opensora_perflow.training.players import Player
from opensora_perflow.worlds.clips import contents, frames_to_tensor, make_clip
from opensora_perflow.worlds.codec import TinyVAE
from opensora_perflow.worlds.mixture import ClassText, Mixture, MixtureNetwork
from opensora_perflow.worlds.model import load_teacher
from opensora_perflow.worlds.text import TinyTextEncoder


@pytest.fixture(scope="module")
def video():
    """Latents of four real clips and what the host sends with them."""
    rng = np.random.default_rng(0)
    frames, captions = zip(*(make_clip(rng, content) for content in contents()[::19]))
    values = {"height": 64.0, "width": 64.0, "num_frames": 17.0, "ar": 1.0, "fps": 8.0}
    args = {**TinyTextEncoder().encode(list(captions)), **{key: torch.full((4,), value) for key, value in values.items()}}
    with torch.no_grad():
        return TinyVAE().eval().encode(frames_to_tensor(np.stack(frames))), args


def said(network, data, args, caplog, **settings):
    """(level, text) of the line about the teacher at a run's first step."""
    torch.manual_seed(0)
    scheduler = PeRFlow(windows=4, draws=dict(seed=0), **settings)
    with caplog.at_level(logging.INFO, logger="opensora_perflow"):
        scheduler.training_losses(network, data, args)
    (record,) = (r for r in caplog.records if "teacher" in r.getMessage() and "fingerprint" not in r.getMessage())
    return record.levelname, record.getMessage()


def flip(module, args, output):
    return -output


def swap(module, args, output):
    return torch.cat(output.chunk(2, dim=1)[::-1], dim=1)


def drop(module, args, output):
    return nn.functional.dropout(output, 0.1)


def small_time(module, args, kwargs):
    return (args[0], args[1] / 1000, *args[2:]), kwargs


def one_token(module, args, kwargs):
    return args, {**kwargs, "mask": torch.eye(kwargs["mask"].shape[1], dtype=torch.int64)[:1].expand_as(kwargs["mask"])}


def test_a_healthy_teacher_fits(video, caplog):
    level, text = said(load_teacher(), *video, caplog)
    assert level == "INFO" and "PeRFlow's teacher fits the data: at t = 0.6" in text and "cosine 0.98" in text


@pytest.mark.parametrize(
    "hook, before, factor, words",
    [
        (swap, False, 1.0, "Most likely the wrong half of the network's output"),
        (small_time, True, 1.0, "Most likely it is told times in 0..1 and knows 0..1000"),
        (one_token, True, 1.0, "different texts get the same answer: the text's mask"),
        (drop, False, 1.0, "two calls with the same input differ by .*: dropout"),
        (None, False, 0.2, "Most likely the latents are 5 times too small"),
    ],
)
def test_a_wrong_teacher_is_warned_of_with_its_cause(hook, before, factor, words, video, caplog):
    network, (data, args) = load_teacher(), video
    if hook is not None:
        network.register_forward_pre_hook(hook, with_kwargs=True) if before else network.register_forward_hook(hook)
    level, text = said(network, factor * data, args, caplog)
    assert level == "WARNING" and text.startswith("PeRFlow's teacher does not look right")
    assert re.search(words, text), text


@pytest.mark.parametrize("shown, told", [(1, True), (2, False)])
def test_a_mask_that_shows_one_token_is_told(shown, told, video, caplog):
    """Also of a text encoder whose first token knows the rest of the text, so that answers differ."""
    data, args = video
    mask = torch.zeros_like(args["mask"])
    mask[:, :shown] = 1
    contextual = args["y"] + args["y"].mean(dim=2, keepdim=True)
    level, text = said(load_teacher(), data, {**args, "y": contextual, "mask": mask}, caplog)
    assert ("the text's mask shows one token of" in text) == told
    assert "different texts get the same answer" not in text


def test_a_cause_is_looked_for_wherever_the_slope_is_not_one(video, caplog):
    """Of these two clips times in 0..1 have a slope of .77, as near to 1 as teachers that are healthy have."""
    network = load_teacher()
    network.register_forward_pre_hook(small_time, with_kwargs=True)
    data, args = video
    level, text = said(network, data[2:], {key: value[2:] for key, value in args.items()}, caplog)
    assert level == "WARNING" and "slope 0.77" in text and "Most likely it is told times in 0..1" in text


@pytest.mark.parametrize(
    "hook, factor, words", [(flip, 1.0, "its sign is flipped"), (None, 5.0, "the latents are 5 times too large")]
)
def test_a_teacher_that_answers_the_opposite_is_refused(hook, factor, words, video, caplog):
    network, (data, args) = load_teacher(), video
    if hook is not None:
        network.register_forward_hook(hook)
    with pytest.raises(ValueError, match=f"answers the opposite .* cosine -0.* Most likely {words}"):
        said(network, factor * data, args, caplog)


def test_a_slope_of_one_is_healthy_whatever_the_cosine(caplog):
    """The mixture's closed-form velocity is the mean itself; its cosine is .65."""
    mixture, classes = Mixture.standard(), torch.arange(64) % 4
    data = mixture.draw(classes, torch.Generator().manual_seed(0))
    level, text = said(MixtureNetwork(mixture), data, ClassText().of(classes), caplog)
    assert level == "INFO" and "cosine 0.6" in text


def test_a_wrong_time_is_told_from_a_flipped_sign(caplog):
    """On the mixture times in 0..1 have the cosine -.60. Turned round that is .60, and .61 at the right time."""
    network, mixture = MixtureNetwork(Mixture.standard()), Mixture.standard()
    network.register_forward_pre_hook(small_time, with_kwargs=True)
    generator = torch.Generator().manual_seed(100)
    class_idx = torch.randint(4, (16,), generator=generator)
    with pytest.raises(ValueError, match="Most likely it is told times in 0..1"):
        said(network, mixture.draw(class_idx, generator), ClassText().of(class_idx), caplog)


def test_an_epsilon_teacher_is_compared_with_the_noise(caplog):
    """Epsilon's answer sigma x is the mean for data N(0, 1)."""
    _, args = batch(tiny_network(), 4)
    data = torch.randn(4, 4, 5, 4, 4)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    network = Epsilon(sigma=lambda timestep: (1 - alpha_bar[timestep.round().long()]).sqrt())
    level, text = said(network, data, args, caplog, path="ddpm")
    assert level == "INFO" and "fits the data: at t = 0.34" in text  # noise is 1.5 times as strong as data there
    network.gain.data.neg_()
    with pytest.raises(ValueError, match="its sign is flipped"):
        said(network, data, args, caplog, path="ddpm")


def test_an_epsilon_teacher_knows_the_scale_of_its_data(caplog):
    """Epsilon's answer is the mean for data N(0, .36). Of latents 5 times too large those 10 times smaller have the higher
    cosine, as less data hide less of the noise: .98 beside .93. But their slope is 1.12."""
    _, args = batch(tiny_network(), 4)
    process = DDPM.from_schedule()

    def best(timestep):
        t = process.from_timestep(timestep)
        return process.sigma(t) / (0.36 * process.alpha(t) ** 2 + process.sigma(t) ** 2)

    data = 5 * 0.6 * torch.randn(4, 4, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    level, text = said(Epsilon(sigma=best), data, args, caplog, path="ddpm")
    assert level == "WARNING" and "the latents are 5 times too large (the VAE's scale) (the cosine is 0.93 then)" in text


def test_times_in_0_1000_are_found_where_a_process_tells_times_in_0_1():
    """As Open-Sora 2.0's does. The answer is the mean for data N(0, .09); told times below .001 it is -x."""
    process = Linear(num_timesteps=1, sign=1)

    def answer(x, timestep):
        t = timestep[:, None, None, None, None] / 1000
        return (t - (1 - t) * 0.09) / ((1 - t) ** 2 * 0.09 + t**2) * x

    player = Player(answer, process, "velocity")
    generator = torch.Generator().manual_seed(0)
    data, noise = (size * torch.randn(4, 4, 5, 8, 8, generator=generator) for size in (0.3, 1.0))
    players = SimpleNamespace(teacher=lambda scale: player, process=process, moving=None)
    batch = SimpleNamespace(data=data, noise=noise, players=players, drawn=SimpleNamespace(t_start=torch.ones(4)), inputs=dict)
    with pytest.raises(ValueError, match=r"told times in 0\.\.1 and knows 0\.\.1000 \(the cosine is 0\.8"):
        check_teacher(batch, SimpleNamespace(shared=lambda *values: values))


def test_a_text_that_was_dropped_does_not_hide_a_mask_of_one_token(video, caplog):
    """The null text has an answer of its own."""
    network, (data, args) = load_teacher(), video
    network.register_forward_pre_hook(one_token, with_kwargs=True)
    null = network.y_embedder.y_embedding[None].expand_as(args["y"][0])
    level, text = said(network, data, {**args, "y": torch.cat([null[None], args["y"][1:]])}, caplog)
    assert level == "WARNING" and "different texts get the same answer" in text


def test_without_data_nothing_is_said_of_the_teacher(video, caplog):
    level, text = said(load_teacher(), torch.zeros_like(video[0]), video[1], caplog)
    assert level == "INFO" and "cannot compare the teacher with data: the latents are blank" in text


def test_it_costs_two_evaluations_once(video):
    counted, network, calls = [], load_teacher(), []
    scheduler = PeRFlow(windows=4, watch=None)
    network.register_forward_pre_hook(lambda module, args: counted.append(module))
    for _ in range(2):
        counted.clear()
        scheduler.training_losses(network, *video)
        calls.append(sum(module is not network for module in counted))
    assert calls[0] - calls[1] == 2


def test_the_slope_and_its_error_are_those_of_a_regression():
    generator = torch.Generator().manual_seed(0)
    answer = torch.randn(100, 50, generator=generator)
    fit = Fit.of(answer, 0.5 * answer + torch.randn(100, 50, generator=generator))
    assert fit.slope == pytest.approx(0.5, abs=3 * fit.error) and fit.error == pytest.approx(5000**-0.5, rel=0.3)
    assert fit.size == pytest.approx(1.25**-0.5, rel=0.05) and fit.cosine == pytest.approx(0.5 / 1.25**0.5, rel=0.05)
    assert Fit.of(torch.zeros(2, 3), torch.ones(2, 3)) == (0.0, 0.0, 0.0, 0.0)


def test_a_student_that_cannot_change_is_refused():
    network = tiny_network().requires_grad_(False)
    with pytest.raises(ValueError, match="the student has 0 trainable parameters"):
        PeRFlow().training_losses(network, *batch(network))


def test_a_teacher_of_one_step_teaches_nothing():
    network = tiny_network()
    scheduler = PeRFlow(
        windows=2, teacher=dict(steps_per_window=1, solver="euler"), guidance=dict(mode="fixed", scale=1.0), watch=dict(every=4)
    )
    with pytest.raises(ValueError, match="held-out error 0 of 0 after 1 training steps"):
        for _ in range(3):
            scheduler.training_losses(network, *batch(network))
