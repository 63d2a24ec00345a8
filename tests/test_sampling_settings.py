"""A student is sampled as the state beside its weights says, where the scheduler's config does not say otherwise."""

import json
import logging

import pytest
import torch
from mmengine import Config
from networks import CountCalls, batch, sizes, text_encoder, tiny_network

from opensora_perflow import PeRFlow
from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.method.ddpm import DDPM
from opensora_perflow.training.plan_file import write_plan
from opensora_perflow.training.state import METADATA_KEY, StudentState, write_state

FIXED = dict(mode="fixed", scale=3.0, image_scale=None, negative=None)
SYNC = dict(mode="sync", scale=None, image_scale=None, negative=None)
BARE = dict(use_timestep_transform=True, transform="v1.2")
WARP = dict(formula="v1.2", scale=1.0, scale_temporal=True)


def state(**changes):
    values = dict(windows=(1.0, 0.6, 0.0), transform=WARP, path="linear", prediction="velocity", guidance=FIXED)
    return StudentState(**{**values, **changes})


def latents(weights, scheduler, network, **arguments):
    """What an inference.py gets from a scheduler."""

    def main():
        cfg = Config(dict(scheduler=dict(type="perflow"), model=dict(from_pretrained=str(weights))))
        noise, args = torch.randn(2, 4, 5, 4, 4), dict(additional_args=sizes(2), progress=False)
        with torch.no_grad():
            sampled = scheduler.sample(network, text_encoder(network), noise, ["a", "b"], **{**args, **arguments})
        return cfg, sampled

    return main()[1]


def sample(weights, scheduler, network=None, **arguments):
    """Network evaluations of an inference.py, in samples of a batch of 2."""
    network = tiny_network() if network is None else network
    count = CountCalls(network)
    latents(weights, scheduler, network, **arguments)
    return count.calls, count.samples


@pytest.fixture
def said(caplog):
    """Warnings so far."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    "trained, calls",
    [
        (dict(), (2, 4)),
        (dict(guidance=SYNC), (2, 8)),
        (dict(windows=(1.0, 0.0), guidance={**FIXED, "scale": 1.0}), (1, 2)),
        (dict(windows=(1.0, 0.9, 0.5, 0.2, 0.0), guidance={**FIXED, "scale": [9.0, 7.0, 5.0, 3.0]}), (4, 8)),
    ],
)
def test_windows_guidance_and_steps_come_from_the_checkpoint(trained, calls, tmp_path, said):
    write_state(tmp_path, state(**trained))
    scheduler = PeRFlow(**BARE)
    assert sample(tmp_path, scheduler) == calls and said() == []
    assert scheduler.windows.edges == scheduler.grid == state(**trained).windows


def test_a_file_of_weights_alone_says_it_in_its_metadata(tmp_path, said):
    write_state_dict(tmp_path / "s.safetensors", tiny_network().state_dict(), {METADATA_KEY: state().to_json()})
    assert sample(tmp_path / "s.safetensors", PeRFlow(**BARE)) == (2, 4) and said() == []


def test_weights_without_a_state_are_sampled_as_the_config_says(tmp_path, said):
    assert sample(tmp_path, PeRFlow(**BARE)) == (4, 16) and said() == []
    assert sample("hpcai-tech/OpenSora-STDiT-v3", PeRFlow(windows=3, **BARE)) == (3, 12)


@pytest.mark.parametrize(
    "told, calls, words",
    [
        (dict(windows=4), (4, 8), "windows trained (1.0, 0.6, 0.0), asked (1.0, 0.75"),
        (dict(windows=[1, 0.6, 0]), (2, 4), None),
        (dict(guidance=dict(mode="sync")), (2, 8), "guidance mode trained fixed, asked sync"),
        (dict(guidance=dict(mode="fixed", scale=7.0)), (2, 4), None),
        (dict(num_sampling_steps=5), (5, 10), None),
        (dict(num_sampling_steps=1), (1, 2), "1 sampling step for 2 windows"),
        (dict(use_timestep_transform=False), (2, 4), "transform trained {'formula': 'v1.2'"),
        (dict(transform="v1.3"), (2, 4), "transform trained"),
    ],
)
def test_what_the_config_names_wins_and_warns_where_it_hurts(told, calls, words, tmp_path, said):
    write_state(tmp_path, state())
    scheduler = PeRFlow(**{**BARE, **told})
    for _ in range(2):
        assert sample(tmp_path, scheduler) == calls
    assert len(said()) == (words is not None) and all(words in text for text in said())


def test_a_curriculums_checkpoint_has_the_windows_of_its_stage(tmp_path, said):
    """Also with the config of its training, which names those of the first stage."""
    write_state(tmp_path, state(windows=(1.0, 0.5, 0.0)))
    training = dict(windows=4, curriculum=dict(windows=[4, 2, 1]), guidance=dict(mode="fixed", scale=3.0))
    for config in (BARE, {**BARE, **training}):
        assert sample(tmp_path, PeRFlow(**config)) == (2, 4) and said() == []
    write_state(tmp_path, state(windows=(1.0, 0.3, 0.0)))  # of none of its stages
    sample(tmp_path, PeRFlow(**BARE, **training))
    assert "windows trained (1.0, 0.3, 0.0), asked (1.0, 0.75" in said()[0]


def test_planned_windows_keep_the_grids_that_the_plan_has(tmp_path, said):
    """perflow.json holds edges only."""
    write_state(tmp_path, state())
    write_plan(tmp_path / "plan.json", (1.0, 0.6, 0.0), [(1.0, 0.7, 0.6, 0.0), (1.0, 0.0)], {})
    for steps, grid in (3, (1.0, 0.7, 0.6, 0.0)), (1, (1.0, 0.0)):
        scheduler = PeRFlow(windows=str(tmp_path / "plan.json"), num_sampling_steps=steps, **BARE)
        assert sample(tmp_path, scheduler) == (steps, 2 * steps) and scheduler.grid == grid
    assert said() == []
    scheduler = PeRFlow(num_sampling_steps=3, **BARE)
    sample(tmp_path, scheduler)
    assert scheduler.grid == (1.0, 0.8, 0.6, 0.0)


def test_steps_whose_uniform_grid_was_trained_are_sampled_on_it(tmp_path, said):
    write_state(tmp_path, state(windows=(1.0, 0.75, 0.5, 0.25, 0.0), draws=dict(grids=[2, 5])))
    for steps, grid in (5, (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)), (2, (1.0, 0.5, 0.0)):
        scheduler = PeRFlow(num_sampling_steps=steps, **BARE)
        sample(tmp_path, scheduler)
        assert scheduler.grid == pytest.approx(grid) and said() == []
    scheduler = PeRFlow(num_sampling_steps=5, sampling_grid="edges", **BARE)
    sample(tmp_path, scheduler)
    assert scheduler.grid[1:3] == (0.875, 0.75)


def test_the_scale_of_mode_range_lies_in_the_trained_range(tmp_path, said):
    write_state(tmp_path, state(guidance={**FIXED, "mode": "range", "scale": [1.0, 3.0]}))
    network = tiny_network()
    assert sample(tmp_path, PeRFlow(cfg_scale=2.0, **BARE), network) == (2, 4) and said() == []
    with pytest.raises(ValueError, match="takes guidance scales from 1 to 3.*got 4; set cfg_scale"):
        sample(tmp_path, PeRFlow(**BARE), network)
    with pytest.raises(ValueError, match=r"cfg_scale \(windows as in .*one for each of the 2 windows"):
        sample(tmp_path, PeRFlow(cfg_scale=[2.0, 2.0, 2.0, 2.0], **BARE), network)


@pytest.mark.parametrize(
    "trained, told, asked, scale, words",
    [
        (3.0, {}, {}, 3.0, None),
        (3.0, dict(cfg_scale=3.0), {}, 3.0, None),
        (3.0, dict(cfg_scale=5.0), {}, 5.0, "guidance 5, and was trained on the states that guidance 3 leads to"),
        (3.0, {}, dict(guidance_scale=[3.0, 2.0]), [3.0, 2.0], "guidance 3, 2, and was trained"),
        ((9.0, 2.0), {}, {}, [9.0, 2.0], None),
        ((9.0, 2.0), dict(windows=3), {}, 4.0, "windows trained"),
        (None, {}, {}, 4.0, None),
        (None, dict(cfg_scale=5.0), {}, 5.0, None),
    ],
)
def test_the_scale_of_mode_sync_is_that_of_the_starts(trained, told, asked, scale, words, tmp_path, said):
    """Against the same network, sampled by a scheduler that is told everything."""
    write_state(tmp_path, state(guidance=SYNC, cfg_scale=trained))
    network, scheduler, plain = tiny_network(), PeRFlow(**BARE, **told), PeRFlow(**{**BARE, "windows": [1, 0.6, 0], **told})
    drawn = {}
    for name, one, weights, arguments in (
        ("trained", scheduler, tmp_path, asked),
        ("told", plain, "nowhere", dict(guidance_scale=scale)),
    ):
        torch.manual_seed(0)
        drawn[name] = latents(weights, one, network, **arguments)
    assert torch.equal(drawn["trained"], drawn["told"])
    assert len(said()) == (words is not None) and all(words in text for text in said())


def test_a_state_holds_the_scale_by_which_its_starts_were_reached():
    for settings, scale in (
        (dict(cfg_scale=[9.0, 5.0]), (9.0, 5.0)),
        (dict(draws=dict(starts="diffused")), None),
        (dict(guidance=dict(mode="fixed", scale=3.0)), None),
    ):
        network, scheduler = tiny_network(), PeRFlow(windows=2, **BARE, **settings)
        scheduler.training_losses(network, *batch(network))
        assert scheduler.state().cfg_scale == scale
        assert StudentState.from_json(scheduler.state().to_json(), "x").cfg_scale == scale


def test_path_and_prediction_come_from_the_checkpoint(tmp_path, said):
    write_state(tmp_path, state(path="ddpm", prediction="diff_eps", transform=None))
    scheduler = PeRFlow()
    sample(tmp_path, scheduler)
    assert isinstance(scheduler.process_of(tiny_network())[0], DDPM) and scheduler.state().prediction == "diff_eps"
    assert said() == []
    scheduler = PeRFlow(path="linear")
    sample(tmp_path, scheduler)
    assert "path trained ddpm, asked linear; prediction trained diff_eps, asked velocity" in said()[0]


def test_a_run_in_this_process_is_sampled_with_its_own_settings(tmp_path, said):
    write_state(tmp_path, state())
    scheduler, network = PeRFlow(windows=3, **BARE), tiny_network()
    sampled_first = PeRFlow(**BARE)
    assert sample(tmp_path, sampled_first, network) == (2, 4)
    for own, calls in (scheduler, (3, 12)), (sampled_first, (4, 16)):
        x, args = batch(network)
        own.training_losses(network, x, args)
        assert sample(tmp_path, own, tiny_network()) == calls
    assert sampled_first.state().guidance["mode"] == "sync"
    assert not any("sampled" in line for line in said())


def test_a_state_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "perflow.json").write_text("{")
    with pytest.raises(ValueError, match="perflow.json is not a state that opensora_perflow wrote"):
        sample(tmp_path, PeRFlow(**BARE))
    values = json.loads(state().to_json()) | {"guidance": {"mode": "sideways"}}
    (tmp_path / "perflow.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="perflow.json does not go with the scheduler's config: guidance.mode must be one of"):
        sample(tmp_path, PeRFlow(**BARE))


def test_the_log_says_once_where_the_settings_are_from(tmp_path, caplog):
    write_state(tmp_path, state())
    scheduler = PeRFlow(**BARE)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            sample(tmp_path, scheduler)
    (text,) = [record.getMessage() for record in caplog.records if "PeRFlow samples" in record.getMessage()]
    assert "2 windows, 2 steps and guidance mode fixed" in text and str(tmp_path / "perflow.json") in text


@pytest.mark.parametrize("kept, warns", [([0.0] * 5, True), ([0.0] * 4 + [1.0], False), ([0.05] * 5, False)])
def test_a_clip_of_reference_frames_alone_is_told(kept, warns, said):
    scheduler = PeRFlow()
    for _ in range(2):
        sample("nowhere", scheduler, mask=torch.tensor([[1.0] * 5, kept]))
    assert len(said()) == warns and all("all 5 latent frames of a clip are reference frames" in text for text in said())
