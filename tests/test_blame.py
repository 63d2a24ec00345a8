"""Where numbers are not finite, the first thing that is not is named, with its windows and the step."""

import re

import pytest
import torch
from networks import PLAIN, batch, tiny_network
from safetensors.torch import save_file

from opensora_perflow import PeRFlow
from opensora_perflow.training.blame import NotFinite, bad_solution, check_way

DIFFUSED = dict(PLAIN, watch=None)
NAN = float("nan")


def healthy(network, steps=2, **settings):
    """A scheduler after two good steps, in which the last window's start is reached through all the others."""
    scheduler = PeRFlow(**{"watch": None, **settings})
    for _ in range(steps):
        x, args = batch(network, 4)
        scheduler.training_losses(network, x, args)
    return scheduler


def fill(parameter, value=NAN):
    with torch.no_grad():
        parameter.fill_(value)


def bad_latents(place, network, x, args):
    x[1, 0, 0, 0, 0] = NAN
    return healthy(network, **PLAIN)


def bad_text(place, network, x, args):
    args["y"][2, 0, 0, 0] = NAN
    return healthy(network)


def bad_negative(place, network, x, args):
    y = torch.full((1, *args["y"].shape[2:]), NAN)
    save_file({"y": y, "mask": torch.ones(1, y.shape[1], dtype=torch.int64)}, place / "negative.safetensors")
    scheduler = healthy(network, guidance=dict(mode="fixed", scale=3.0))
    scheduler._negative = {"y": y, "mask": torch.ones(1, y.shape[1])}
    return scheduler


def bad_scale(place, network, x, args):
    scheduler = healthy(network)
    object.__setattr__(scheduler.keys, "cfg_scale", float("inf"))  # past the check of the config
    return scheduler


def bad_student(place, network, x, args):
    scheduler = healthy(network)
    fill(network.final_layer.linear.bias)
    return scheduler


def bad_student_in_the_loss(place, network, x, args):
    scheduler = healthy(network, **PLAIN)
    fill(network.final_layer.linear.bias)
    return scheduler


def bad_teacher(place, network, x, args):
    scheduler = healthy(network)
    fill(scheduler.run.teacher.network.final_layer.linear.bias)
    return scheduler


def bad_size(place, network, x, args):
    args["fps"][0] = NAN
    return healthy(network)


PLACES = {
    bad_latents: "the latents, an input of this step: it holds NaN or infinity for 1 of 4 samples",
    bad_text: "the text embeddings, an input of this step: it holds NaN or infinity for 1 of 4",
    bad_negative: "the embedding of guidance.negative, an input",
    bad_scale: "cfg_scale, the guidance scale, an input",
    bad_student: "the student (on its way to a window's start) returned NaN or infinity",
    bad_student_in_the_loss: "the student (in the loss) returned NaN or infinity for 4 of 4",
    bad_teacher: "the teacher (a copy",
    bad_size: "'fps' of the batch, an input of this step: it holds NaN or infinity for 1 of 4",
}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_the_first_that_is_not_finite_is_named(place, tmp_path):
    network = tiny_network().train()
    x, args = batch(network, 4)
    scheduler = place(tmp_path, network, x, args)
    with pytest.raises(ValueError, match=f"^{re.escape(PLACES[place])}") as raised:
        for _ in range(4):  # a step whose windows are all the first has no way that could go bad
            scheduler.training_losses(network, x, args)
    step = int(re.search(r"at training step (\d+)", str(raised.value))[1])
    assert step == scheduler.run.randomness.steps >= 3
    assert re.search(r"in the windows t [\d.]+ -> [\d.]+", str(raised.value))
    if place in (bad_student, bad_student_in_the_loss, bad_teacher):
        assert "1 of its weights are not finite, final_layer.linear.bias the first" in str(raised.value)


def test_the_window_on_the_way_is_the_first_bad_one_of_a_sample_that_goes_through_it():
    route = torch.tensor([1.0, 0.75, 0.5])[:, None].expand(3, 2)
    way = [torch.zeros(2, 3), torch.tensor([[NAN] * 3, [0.0] * 3])]
    check_way(way, route, torch.tensor([1, 2]))  # the first sample was there already, and its second step was dropped
    with pytest.raises(NotFinite, match=r"for 1 of 2 samples, in the windows t 0.75 -> 0.5"):
        check_way(way, route, torch.tensor([2, 2]))


def test_not_finite_solutions_name_their_windows():
    x, times = torch.zeros(1, 3, 2), torch.tensor([[1.0, 0.75, 0.5], [0.75, 0.5, 0.25]])
    x[0, 1, 0], x[0, 2, 1] = torch.nan, torch.inf
    assert str(bad_solution(x, times, "weights")).startswith(
        "the teacher (weights) returned NaN or infinity for 2 of 3 samples, in the windows t 0.75 -> 0.5, t 0.5"
    )


def test_a_good_step_looks_twice(monkeypatch):
    """Once at the teacher's ends, once at the losses."""
    network = tiny_network().train()
    scheduler, seen, isfinite = healthy(network), [], torch.isfinite
    x, args = batch(network, 4)
    monkeypatch.setattr(torch, "isfinite", lambda value: seen.append(value.shape) or isfinite(value))
    scheduler.training_losses(network, x, args)
    assert seen == [x.shape, (4,)]
