"""Sampling students of Open-Sora 2.0: times, rows, guidance, and what the state beside the weights says."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from mmdit import LAYOUT, TinyMMDiT, arguments, hooked, note_nulls, positions, told
from torch import nn

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.conventions import shift_time
from opensora_perflow.hosts.v2.denoiser import StudentDenoiser
from opensora_perflow.hosts.v2.flux import PeRFlowFlux
from opensora_perflow.hosts.v2.keys import read_config
from opensora_perflow.hosts.v2.network import network_output
from opensora_perflow.hosts.v2.sampling import SamplingSettings, one_row, other_steps
from opensora_perflow.hosts.v2.text import null_text
from opensora_perflow.training.state import find_state, write_state

FIXED = dict(guidance=dict(mode="fixed", scale=3.0))
ALPHA = 5.727


def schedule(steps, alpha=ALPHA):
    """Upstream's get_schedule: float32 all the way."""
    t = torch.linspace(1, 0, steps + 1)
    return (t if alpha is None else alpha * t / (1 + (alpha - 1) * t)).tolist()


def settings(**config):
    return SamplingSettings.of(*read_config(config))


@pytest.mark.parametrize("steps", [4, 8, 12, 48])
def test_uniform_windows_keep_the_sampler_s_own_times(steps):
    """N steps are N windows, or N / K in each: the list itself goes on, to the last bit."""
    asked = schedule(steps)
    assert settings(windows=4).times(asked, ALPHA) == (asked, [])


def test_planned_windows_have_their_edges():
    """One step a window: the times are the warped edges, and the log says so once."""
    edges = [1.0, 0.9, 0.5, 0.0]
    times, said = settings(windows=edges).times(schedule(3), ALPHA)
    assert times == shift_time(torch.tensor(edges, dtype=torch.float64), ALPHA).tolist()
    ((level, text),) = said
    assert level == logging.INFO and "PeRFlow samples at the times 1, 0.981, 0.851, 0" in text
    uniform, said = settings(windows=edges, sampling_grid="uniform").times(schedule(3), ALPHA)
    assert uniform == schedule(3) and said == []


def test_steps_that_windows_do_not_divide():
    """5 steps on 4 windows: the noisiest window has two; with sampling_grid="uniform", and for steps that draws.grids trains,
    the host's own times stay."""
    times, said = settings(windows=4).times(schedule(5), ALPHA)
    expected = shift_time(torch.tensor([1, 0.875, 0.75, 0.5, 0.25, 0], dtype=torch.float64), ALPHA)
    assert times == expected.tolist() and [level for level, _ in said] == [logging.INFO]
    for other in (dict(sampling_grid="uniform"), dict(draws=dict(grids=[5]))):
        assert settings(windows=4, **other).times(schedule(5), ALPHA) == (schedule(5), [])


def test_fewer_steps_than_windows_warn():
    times, said = settings(windows=4).times(schedule(2), ALPHA)
    assert times == schedule(2)
    ((level, text),) = said
    assert level == logging.WARNING and "2 sampling steps for 4 windows" in text and "sampling_option.num_steps=4" in text
    assert settings(windows=4, draws=dict(grids=[2])).times(schedule(2), ALPHA) == (schedule(2), [])


@pytest.mark.parametrize("asked", [None, 2.0], ids=["shift=False", "another flow_shift"])
def test_another_warp_than_the_student_s_is_not_taken(asked):
    times, said = settings(windows=4).times(schedule(4, asked), ALPHA)
    assert times == pytest.approx(schedule(4), abs=1e-6)
    ((level, text),) = said
    assert level == logging.WARNING and "shift=True and flow_shift=None" in text


def test_flow_shift_takes_the_place_of_the_formula():
    network, hooks = hooked({**FIXED, "flow_shift": 3.0})
    assert hooks.sampling_times(schedule(4, 3.0), network.eval(), positions()) == schedule(4, 3.0)
    assert hooks.sampling_times(schedule(4), network, positions()) == pytest.approx(schedule(4, 3.0), abs=1e-6)


def test_the_last_time_is_zero_and_the_first_one():
    for windows in (1, 4, [1.0, 0.3, 0.0]):
        for steps in (1, 2, 3, 7):
            times, _ = settings(windows=windows).times(schedule(steps), ALPHA)
            assert len(times) == steps + 1 and times[0] == 1.0 and times[-1] == 0.0
            assert all(one > other for one, other in zip(times, times[1:]))


@pytest.mark.parametrize("alpha", [1.0, 2.07, ALPHA])
def test_an_image_model_has_its_own_steps(alpha):
    """T62: the warp is read off the times that were asked for four steps."""
    assert other_steps(schedule(4, alpha), 50, 9.0) == pytest.approx(schedule(50, alpha), abs=1e-5)


def test_one_row_takes_the_first_third():
    three = {name: value.repeat(3, *[1] * (value.dim() - 1)) for name, value in arguments()[0].items()}
    three["txt"] = torch.arange(6.0)[:, None, None].expand(6, 5, 3)
    taken, copies = one_row({**three, "patch_size": 2, "scale": torch.tensor(1.0)})
    assert copies == 3 and all(len(taken[name]) == 2 for name in three)
    assert taken["txt"][:, 0, 0].tolist() == [0.0, 1.0] and taken["patch_size"] == 2 and taken["scale"].dim() == 0


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_other_batches_stay_as_they_are(batch_size):
    given, _ = arguments(batch_size)
    given["img"] = torch.randn_like(given["img"])
    taken, copies = one_row(given)
    assert copies == 1 and all(taken[name] is value for name, value in given.items())


def test_one_evaluation_in_place_of_three():
    network, hooks = hooked(FIXED)
    given, _ = arguments(1)
    three = {name: value.repeat(3, *[1] * (value.dim() - 1)) for name, value in given.items()}
    three["txt"] = torch.randn_like(three["txt"])
    three["txt"][:1] = given["txt"]
    with torch.inference_mode():
        answer = network.eval()(**three)
    assert network.rows == [1] and hooks.evaluations == 1
    alone = TinyMMDiT.forward(network, **given)
    assert torch.equal(answer, alone.repeat(3, 1, 1))


def test_mode_sync_is_sampled_with_all_rows():
    network, hooks = hooked()
    three = {name: value.repeat(3, *[1] * (value.dim() - 1)) for name, value in arguments(1)[0].items()}
    with torch.inference_mode():
        network.eval()(**three)
    assert network.rows == [3] and hooks.evaluations == 3


class Denoiser:
    """Records what it is called with."""

    def prepare_guidance(self, text, **options):
        return text * 3, options

    def denoise(self, model, **options):
        self.options = options
        return options["img"]


def denoise(model, t2i_steps=None, steps=4, guidance=7.5, **others):
    inner = Denoiser()
    given = dict(img=torch.zeros(1), img_ids=positions(), timesteps=schedule(steps), guidance=guidance, **others)
    StudentDenoiser(inner, t2i_steps).denoise(model, **given)
    return inner.options


def test_a_denoiser_steps_students_at_their_times():
    network, hooks = hooked({**FIXED, "windows": [1.0, 0.5, 0.0]})
    options = denoise(network.eval(), steps=2)
    assert options["timesteps"] == hooks.sampling_times(schedule(2), network, positions()) != schedule(2)
    assert StudentDenoiser(Denoiser(), None).prepare_guidance(text=["a"], neg=None) == (["a"] * 3, {"neg": None})


def test_other_networks_are_sampled_as_ever():
    network = TinyMMDiT().eval()
    assert denoise(network)["timesteps"] == schedule(4) and denoise(network, 4)["timesteps"] == schedule(4)
    assert denoise(network, 50)["timesteps"] == pytest.approx(schedule(50), abs=1e-5)


def test_an_image_of_a_one_step_student_has_all_its_steps():
    """T62: one step tells no warp; flow_shift, or the formula of the image's sizes, does."""
    times = denoise(TinyMMDiT().eval(), 20, steps=1)["timesteps"]
    assert times == pytest.approx(schedule(20, LAYOUT.alpha), abs=1e-5)
    times = denoise(TinyMMDiT().eval(), 20, steps=1, flow_shift=3.0)["timesteps"]
    assert times == pytest.approx(schedule(20, 3.0), abs=1e-5)


def test_a_scale_out_of_the_trained_range_is_refused():
    network, _ = hooked(dict(guidance=dict(mode="range", scale=(2.0, 6.0))), guidance_embed=True)
    assert denoise(network.eval(), guidance=6.0)["guidance"] == 6.0
    with pytest.raises(ValueError, match=r"takes guidance scales from 2 to 6.* got 7.5; .*sampling_option.guidance"):
        denoise(network)


@pytest.mark.parametrize("count, text_scale, image_scale", [(1, 1.0, 1.0), (2, 3.0, 1.0), (3, 7.5, 3.0), (3, 1.0, 3.0)])
def test_guidance_is_upstream_s_formula(count, text_scale, image_scale, monkeypatch):
    """samp:202-226: u2 + g_img (u - u2) + g_txt (c - u) with rows [text, negative, negative without reference], to the last
    bit of one call with the same rows."""
    nulls = note_nulls(monkeypatch)
    network, given = TinyMMDiT(), told(reference=count == 3)
    x, t = torch.randn(2, 2, 3, 4, 8), torch.tensor([0.8, 0.3], dtype=torch.float64)
    field = network_output(network.forward, given, LAYOUT, torch.float32, text_scale=text_scale, image_scale=image_scale)
    found = field(x, t)
    assert network.rows == [2 * count]
    null = {name: value.expand_as(given[name]) for name, value in nulls.items()}
    rows = [given, {**given, **null}, {**given, **null, "cond": torch.zeros_like(given["cond"])}][:count]
    stacked = {name: torch.cat([row[name] for row in rows]) for name in given}
    img = LAYOUT.pack(x).repeat(count, 1, 1)
    parts = network(img=img, timesteps=t.float().repeat(count), **stacked).chunk(count)
    if count == 1:
        expected = parts[0]
    elif count == 2:
        expected = parts[1] + text_scale * (parts[0] - parts[1])
    else:
        expected = parts[2] + image_scale * (parts[1] - parts[2]) + text_scale * (parts[0] - parts[1])
    assert torch.equal(found, LAYOUT.unpack(expected))


def test_image_guidance_without_reference_frames_is_none(monkeypatch):
    note_nulls(monkeypatch)
    network = TinyMMDiT()
    x, t = torch.randn(2, 2, 3, 4, 8), torch.tensor([0.8, 0.3])
    network_output(network.forward, told(), LAYOUT, torch.float32, text_scale=1.0, image_scale=3.0)(x, t)
    network_output(network.forward, told(), LAYOUT, torch.float32, text_scale=2.0, image_scale=3.0)(x, t)
    assert network.rows == [2, 4]


def test_scales_of_each_sample(monkeypatch):
    note_nulls(monkeypatch)
    network, given = TinyMMDiT(), told()
    x, t, scale = torch.randn(2, 2, 3, 4, 8), torch.tensor([0.8, 0.3]), torch.tensor([1.0, 4.0], dtype=torch.float64)
    both = network_output(network.forward, given, LAYOUT, torch.float32, text_scale=scale)(x, t)
    for row, value in enumerate((1.0, 4.0)):
        alone = {name: given[name][row : row + 1] for name in given}
        field = network_output(network.forward, alone, LAYOUT, torch.float32, text_scale=value)
        torch.testing.assert_close(both[row], field(x[row : row + 1], t[row : row + 1])[0], rtol=0, atol=1e-5)


def test_nulls_are_those_of_the_encoders(monkeypatch):
    nulls = note_nulls(monkeypatch)
    found = null_text(told(dtype=torch.bfloat16))
    assert found["txt"].shape == (2, 5, 3) and found["txt"].dtype == torch.bfloat16
    assert torch.equal(found["y_vec"], nulls["y_vec"].bfloat16().expand(2, -1))


def test_lengthened_text_repeats_the_null_s_last_token(monkeypatch):
    """T45: seq_align lengthens txt; train.py:417 repeats the last token of its null."""
    nulls = note_nulls(monkeypatch, tokens=3)
    found = null_text(told())["txt"]
    assert torch.equal(found[0], torch.cat([nulls["txt"][0], nulls["txt"][0, -1:], nulls["txt"][0, -1:]]))


@pytest.mark.parametrize("tokens, shape", [(6, r"\[1, 6, 3\]"), (5, r"\[1, 5, 3\]")])
def test_nulls_of_other_sizes_are_refused(monkeypatch, tokens, shape):
    note_nulls(monkeypatch, tokens=tokens)
    given = told()
    if tokens == 5:
        given["y_vec"] = torch.zeros(2, 7)
    with pytest.raises(ValueError, match=rf"embeddings are {shape} and \[1, 4\], the batch's .* of the same sizes"):
        null_text(given)


@pytest.mark.parametrize("missing", [("t5",), ("clip",), ("t5", "clip")])
def test_encoders_that_noted_nothing_are_named(monkeypatch, missing):
    from opensora_perflow.hosts.v2 import text

    note_nulls(monkeypatch)
    for kind in missing:
        del text._NULLS[{"t5": "txt", "clip": "y_vec"}[kind]]
    match = f"nobody noted {' or '.join(missing)}'s: write " + " and ".join(
        rf'{k}=dict\(type="perflow_{k}", ...\)' for k in missing
    )
    with pytest.raises(ValueError, match=match):
        null_text(told())


def test_other_texts_are_not_noted(monkeypatch):
    from opensora_perflow.hosts.v2 import text

    monkeypatch.setattr(text, "_NULLS", {})
    encoder = text.noting_null(nn.Identity(), "txt")
    for prompt in ("a", [""], ["a", ""]):
        encoder.forward = lambda text: torch.zeros(1)
        encoder(prompt)
    assert text._NULLS == {}


def sampled_with(weights, config=None, **others):
    """The settings of a script that samples weights."""

    def main():
        cfg = {"model": {"type": "perflow_flux", "from_pretrained": str(weights)}, **others}
        return hooks.settings, cfg

    hooks = PeRFlowFlux(config)
    return main()[0]


def trained_state(folder, config):
    network, hooks = hooked(config)
    state = hooks._state(SamplingSettings.of(hooks.recipe, hooks.keys))
    folder.mkdir(parents=True, exist_ok=True)
    write_state(folder, state)
    return state


@pytest.mark.parametrize("part", ["", "model", "lora", "model/model-00001.safetensors"])
def test_settings_come_from_the_state_beside_the_weights(tmp_path, part, caplog):
    config = dict(windows=[1.0, 0.5, 0.0], flow_shift=3.0, draws=dict(grids=[7]), guidance=dict(mode="fixed", scale=4.0))
    state = trained_state(tmp_path / "epoch0-global_step4", config)
    weights = tmp_path / "epoch0-global_step4" / part
    (weights.parent if weights.suffix else weights).mkdir(exist_ok=True)
    if weights.suffix:
        write_state_dict(weights, TinyMMDiT().state_dict())
    assert find_state(weights) == (state, tmp_path / "epoch0-global_step4" / "perflow.json")
    others = {"pretrained_lora_path": str(weights)} if part == "lora" else {}
    with caplog.at_level(logging.INFO, "opensora_perflow"):
        settings = sampled_with("hpcai-tech/Open-Sora-v2" if part == "lora" else weights, **others)
    assert settings.windows.edges == (1.0, 0.5, 0.0) and settings.grids == (7,)
    assert settings.keys.flow_shift == 3.0 and settings.recipe.guidance.folded
    assert "with 2 windows and guidance mode fixed; what the config leaves out is from" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_config_comes_first_and_is_told_apart(tmp_path, caplog):
    trained_state(tmp_path, dict(windows=4, guidance=dict(mode="fixed", scale=4.0)))
    with caplog.at_level(logging.WARNING, "opensora_perflow"):
        settings = sampled_with(tmp_path, dict(windows=2))
    assert settings.windows.num_windows == 2 and settings.recipe.guidance.mode == "fixed"
    (record,) = caplog.records
    assert "windows trained (1.0, 0.75, 0.5, 0.25, 0.0), asked (1.0, 0.5, 0.0)" in record.message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "opensora_perflow"):
        assert not sampled_with(tmp_path, dict(guidance=dict(mode="sync"))).recipe.guidance.folded
    assert "guidance mode trained fixed, asked sync" in caplog.text


def test_a_scale_a_window_goes_with_other_windows(tmp_path):
    trained_state(tmp_path, dict(windows=4, guidance=dict(mode="fixed", scale=[7.0, 4.4, 4.1, 4.1])))
    assert sampled_with(tmp_path, dict(windows=2)).recipe.guidance.folded


def test_a_student_of_1_x_is_refused(tmp_path):
    trained_state(tmp_path, {})
    file = tmp_path / "perflow.json"
    for transform in (None, {"formula": "1.2"}):
        file.write_text(json.dumps({**json.loads(file.read_text()), "transform": transform}))
        with pytest.raises(ValueError, match="belongs to a student of Open-Sora 1.x"):
            sampled_with(tmp_path)


def test_a_state_that_makes_no_sense_is_refused(tmp_path):
    trained_state(tmp_path, {})
    file = tmp_path / "perflow.json"
    state = json.loads(file.read_text())
    for wrong in (
        {"guidance": {"mode": "loud"}},
        {"draws": {"grids": 5}},
        {"transform": {"formula": "v2.0", "flow_shift": "high"}},
        {"transform": {"formula": "v2.0", "flow_shift": -1}},
    ):
        file.write_text(json.dumps({**state, **wrong}))
        with pytest.raises(ValueError, match="perflow.json does not go with the config's perflow"):
            sampled_with(tmp_path)


def test_the_warp_is_part_of_the_state(tmp_path):
    """T41: one that was trained with flow_shift says so, and one that was not says None."""
    assert trained_state(tmp_path, {}).transform == {"formula": "v2.0", "flow_shift": None}
    assert trained_state(tmp_path, dict(flow_shift=3)).transform["flow_shift"] == 3.0


@pytest.mark.parametrize(
    "config, scale, image_scale",
    [
        ({}, 7.5, 3.0),
        (dict(cfg_scale=[9.0, 5.0], windows=2, image_cfg_scale=2.0), (9.0, 5.0), 2.0),
        (dict(draws=dict(starts="diffused")), None, None),
        (FIXED, None, None),
    ],
)
def test_a_state_holds_the_scales_by_which_its_starts_were_reached(tmp_path, config, scale, image_scale):
    trained_state(tmp_path, config)
    found, _ = find_state(tmp_path)
    assert (found.cfg_scale, found.image_cfg_scale) == (scale, image_scale)


@pytest.mark.parametrize(
    "trained, options, words",
    [
        ({}, dict(guidance=7.5, guidance_img=3.0), []),
        ({}, dict(guidance=5.0, guidance_img=3.0), ["guidance=5, and was trained on the states that guidance 7.5 leads to"]),
        ({}, dict(guidance=7.5, guidance_img=1.0), []),  # no frame is given
        ({}, dict(guidance=7.5, guidance_img=1.0, masks=torch.ones(1)), ["guidance_img=1, and was trained"]),
        ({}, dict(guidance=7.5), ["guidance=1, and was trained"]),  # "distill" guides nothing
        (dict(windows=2, cfg_scale=[9.0, 2.0]), dict(guidance=9.0, guidance_img=3.0), ["guidance=9, and was trained", "9, 2"]),
        (FIXED, dict(guidance=5.0, guidance_img=1.0), []),
        (None, dict(guidance=5.0, guidance_img=3.0), []),  # of an older file
    ],
)
def test_other_guidance_than_that_of_the_starts_is_told(trained, options, words, tmp_path, caplog):
    trained_state(tmp_path, trained or {})
    if trained is None:
        file = tmp_path / "perflow.json"
        old = {name: value for name, value in json.loads(file.read_text()).items() if "cfg_scale" not in name}
        file.write_text(json.dumps(old))
    hooks = PeRFlowFlux()
    network = hooks.attach(TinyMMDiT()).eval()

    def main():
        cfg = {"model": {"from_pretrained": str(tmp_path)}}
        denoise(network, **{"masks": torch.zeros(1), **options})
        denoise(network, **{"masks": torch.zeros(1), **options})
        return cfg

    with caplog.at_level(logging.WARNING, "opensora_perflow"):
        main()
    said = [record.message for record in caplog.records if "Open-Sora's times" not in record.message]
    assert len(said) == bool(words) and all(word in text for word in words for text in said)
