"""A student's state: kept beside its weights, restored with --load, and compared before it is trained on or sampled."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine import Config
from networks import PLAIN, batch, sizes, text_encoder, tiny_network

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.saving import before_each_save, resumed_checkpoint
from opensora_perflow.hosts.v1.scheduler import PeRFlow
from opensora_perflow.training.recipe import TeacherSettings
from opensora_perflow.training.state import (
    METADATA_KEY,
    StudentState,
    check_resumed,
    find_state,
    sampling_mismatch,
    write_state,
)
from opensora_perflow.training.teacher import check_source, fingerprint

STATE = StudentState(
    windows=(1.0, 0.6, 0.0),
    transform={"formula": "v1.2", "scale": 1.0, "scale_temporal": True},
    path="linear",
    prediction="velocity",
    guidance={"mode": "fixed", "scale": 7.0},
    teacher="ab12",
    teacher_source="weights from original",
    objective=[{"type": "perflow", "weight": 0.5}],
    draws={"grids": (5, 6), "seed": 42},
    steps=12,
)


def changed(**values):
    return StudentState(**{**{name: getattr(STATE, name) for name in STATE.__dataclass_fields__}, **values})


# --- the file ---


def test_round_trip(tmp_path):
    write_state(tmp_path, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["perflow.json"]  # nothing temporary is left
    assert find_state(tmp_path) == (STATE, tmp_path / "perflow.json")
    assert json.loads((tmp_path / "perflow.json").read_text())["windows"] == [1.0, 0.6, 0.0]


def test_found_from_whatever_a_host_calls_weights(tmp_path):
    folder = tmp_path / "epoch0-global_step8"
    (folder / "model").mkdir(parents=True)
    (folder / "lora").mkdir()
    (folder / "ema.pt").touch()
    write_state(folder, STATE)
    host = SimpleNamespace(first_weights=lambda: None, resumed=lambda: None, trained_students=lambda weights: False)
    for weights in (folder, folder / "model", folder / "lora", folder / "ema.pt", str(folder)):
        assert find_state(weights)[0] == STATE
        with pytest.raises(ValueError, match="they are a student's"):
            check_source(TeacherSettings(from_pretrained=weights), host)
    for weights in (tmp_path, folder / "optimizer", "hpcai-tech/OpenSora-STDiT-v3"):
        assert find_state(weights) is None


def test_safetensors_carry_their_own(tmp_path):
    write_state_dict(tmp_path / "student.safetensors", {"a": torch.ones(2)}, {METADATA_KEY: STATE.to_json()})
    write_state_dict(tmp_path / "other.safetensors", {"a": torch.ones(2)})
    assert find_state(tmp_path / "student.safetensors") == (STATE, tmp_path / "student.safetensors")
    assert find_state(tmp_path / "other.safetensors") is None


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1}', '{"format": 1, "windows": [1, 2]}'])
def test_an_unreadable_state_is_named(tmp_path, text):
    (tmp_path / "perflow.json").write_text(text)
    with pytest.raises(ValueError, match=r"perflow\.json is not a state that opensora_perflow wrote .*; restore it, or remove"):
        find_state(tmp_path)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("windows", "1, 0", "window edges must be a list"),
        ("windows", [1, True, 0], "window edges must be finite numbers"),
        ("transform", ["v1.2"], "transform must be a dict, got"),
        ("path", 3, "path must be one of linear, ddpm, got 3"),
        ("prediction", ["velocity"], "prediction must be one of velocity"),
        ("guidance", "sync", "guidance must be a dict, got 'sync'"),
        ("guidance", [["mode", "sync"]], "guidance must be a dict"),
        ("teacher", 12, "teacher must be text, got 12"),
        ("stage", "1", "stage must be an integer >= 1, got '1'"),
        ("stage", 10**30, "stage must be at most"),
        ("curriculum", {"stage": 0}, "a curriculum's state has the keys stage, step, best, stale, got stage"),
        ("curriculum", {"stage": "0", "step": 0, "best": None, "stale": 0}, "curriculum.stage must be an integer >= 0"),
        ("curriculum", {"stage": 0, "step": 0, "best": "low", "stale": 0}, "curriculum.best must be a number >= 0"),
        ("draws", [1], "draws must be a dict"),
        ("draws", {"seed": "4"}, "draws.seed must be an integer or None, got '4'"),
        ("steps", -1, "steps must be an integer >= 0, got -1"),
        ("steps", None, "steps must be an integer >= 0, got None"),
    ],
)
def test_values_of_another_type_are_refused_when_a_state_is_read(tmp_path, name, value, message):
    (tmp_path / "perflow.json").write_text(json.dumps({**json.loads(STATE.to_json()), name: value}))
    with pytest.raises(ValueError, match=rf"perflow\.json is not a state .*{message}.*; restore it, or remove it to use"):
        find_state(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        (STATE.to_json().replace('"steps": 12', '"steps": NaN').encode(), "NaN is no number"),
        (STATE.to_json().encode() + b" " * 2**20, "it is larger than 1048576 bytes"),
        (b'{"format": 1, "guidance": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "it is nested too deeply"),
        (STATE.to_json().encode("utf-16"), "UnicodeDecodeError"),
    ],
)
def test_a_states_text_is_bounded(tmp_path, text, message):
    (tmp_path / "perflow.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"perflow\.json is not a state .*{message}"):
        find_state(tmp_path)


def test_broken_safetensors_are_named(tmp_path):
    (tmp_path / "student.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"student\.safetensors"):
        find_state(tmp_path / "student.safetensors")
    assert find_state("x" * 5000) is None  # no file has such a name


def test_a_later_versions_state_is_refused(tmp_path):
    (tmp_path / "perflow.json").write_text(STATE.to_json().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="has format 2, this version reads 1; update opensora_perflow"):
        find_state(tmp_path)


def test_a_state_with_a_key_that_left_is_read(tmp_path):
    """Earlier versions wrote "window_time": "host", the only meaning that edges have now."""
    values = json.loads(STATE.to_json())
    (tmp_path / "perflow.json").write_text(json.dumps({"window_time": "host", **values}))
    assert find_state(tmp_path)[0] == STATE


def test_a_state_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "taken").touch()  # a file where the folder should be
    with pytest.raises(OSError, match="nothing of it was saved: see to the disk, and start again .* --load"):
        write_state(tmp_path / "taken", STATE)


# --- who is who ---


def test_fingerprints_tell_weights_apart():
    network = tiny_network()
    assert fingerprint(network) == fingerprint(tiny_network()) and len(fingerprint(network)) == 16
    found = {fingerprint(network), fingerprint(tiny_network(seed=1)), fingerprint(tiny_network().bfloat16())}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 1e-6)
    assert len(found | {fingerprint(network)}) == 4


# --- comparing ---


@pytest.mark.parametrize(
    "name, value",
    [
        ("windows", (1.0, 0.5, 0.0)),
        ("transform", None),
        ("path", "ddpm"),
        ("prediction", "ddim_eps"),
        ("guidance", {"mode": "fixed", "scale": 3.0}),
        ("teacher", "cd34"),
    ],
)
def test_a_resumed_training_keeps_its_settings(name, value, caplog):
    other = changed(**{name: value})
    with pytest.raises(ValueError, match=rf"ckpt\) was trained with other settings: {name} was .*, now .*allow_change=True"):
        check_resumed(STATE, other, "ckpt", allow_change=False)
    with caplog.at_level(logging.WARNING):
        check_resumed(STATE, other, "ckpt", allow_change=True)
    assert "goes on with changed settings (allow_change)" in caplog.text
    check_resumed(STATE, STATE, "ckpt", allow_change=False)


def test_refusals_name_both_values():
    with pytest.raises(ValueError, match=r"windows was \(1\.0, 0\.6, 0\.0\), now \(1\.0, 0\.5, 0\.0\)"):
        check_resumed(STATE, changed(windows=(1.0, 0.5, 0.0)), "ckpt", allow_change=False)
    with pytest.raises(ValueError, match=r"teacher was ab12 \(weights from original\), now cd34 \(weights from other\)"):
        check_resumed(STATE, changed(teacher="cd34", teacher_source="weights from other"), "ckpt", allow_change=False)


def test_what_may_change():
    check_resumed(STATE, changed(steps=0, objective="perflow", draws={}, stage=2, teacher_source="x"), "ckpt", False)
    same = changed(guidance={"mode": "fixed", "scale": 1.0}, teacher=None, steps=0)
    assert sampling_mismatch(STATE, same, "ckpt") is None


def test_sampling_with_other_settings_names_both():
    message = sampling_mismatch(STATE, changed(windows=(1.0, 0.5, 0.0), guidance={"mode": "sync"}), "perflow.json")
    assert "windows trained (1.0, 0.6, 0.0), asked (1.0, 0.5, 0.0)" in message
    assert "guidance mode trained fixed, asked sync" in message and "(perflow.json)" in message


# --- with the scheduler, in a main() like Open-Sora's ---


class Booster:
    """Saves as colossalai's: a folder model/ in a checkpoint's folder."""

    def save_model(self, model, checkpoint, shard=False):
        assert (Path(checkpoint).parent / "perflow.json").is_file()  # the state is there first
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        self.shard = shard


def train(folder, steps, network=None, torch_seed=0, **settings):
    """What a train.py does with a scheduler: (window starts and times of each step, the scheduler). Saves at the end."""
    script = settings.pop("script", {})
    teacher = tiny_network(seed=5)
    write_state_dict(folder / "teacher.safetensors", teacher.state_dict())
    defaults = dict(windows=3, teacher=dict(from_pretrained=str(folder / "teacher.safetensors"), steps_per_window=1))
    network = tiny_network(seed=6).train()
    x, args = batch(network)
    torch.manual_seed(torch_seed)
    drawn = []

    def main():
        cfg = Config(dict(scheduler=dict(type="perflow"), **script))
        booster = Booster()
        scheduler = PeRFlow(**{**defaults, **settings})
        objective = scheduler.objective

        def record(student, segment, t, weights):
            drawn.append(torch.cat([segment.x_start.flatten(), segment.t_start, segment.t_end, t]))
            return objective(student, segment, t, weights)

        scheduler.objective = record
        for _ in range(steps):
            scheduler.training_losses(network, x, args)
        booster.save_model(network, str(folder / f"step{scheduler.run.randomness.steps}" / "model"), shard=True)
        assert booster.shard
        return scheduler, cfg

    return drawn, main()[0]


@pytest.mark.parametrize("settings, times", [(dict(draws=PLAIN["draws"]), 1), ({}, 2)], ids=["plain", "defaults"])
def test_twenty_steps_are_ten_and_ten_resumed(settings, times, tmp_path):
    """Windows, times and noise (in the window starts: data and weights are the same), exactly."""
    whole, _ = train(tmp_path, 20, script=dict(seed=42), **settings)
    first, _ = train(tmp_path, 10, script=dict(seed=42), **settings)
    second, scheduler = train(tmp_path, 10, script=dict(seed=42, load=str(tmp_path / "step10")), **settings)
    assert len(whole) == 20 * times and all(map(torch.equal, whole, first + second))
    assert not torch.equal(whole[0], whole[10 * times])
    state = find_state(tmp_path / "step20")[0]
    assert (state.steps, state.draws["seed"], state.windows) == (20, 42, scheduler.recipe.windows.edges)
    assert state.teacher == fingerprint(tiny_network(seed=5)) and "weights from" in state.teacher_source


@pytest.mark.parametrize("settings, times", [(dict(draws=PLAIN["draws"]), 1), ({}, 2)], ids=["plain", "defaults"])
def test_a_run_without_a_seed_of_its_own_goes_on_with_the_first_ones(settings, times, tmp_path):
    whole, _ = train(tmp_path, 4, torch_seed=8, **settings)
    train(tmp_path, 2, torch_seed=8, **settings)
    second, _ = train(tmp_path, 2, torch_seed=9, script=dict(load=str(tmp_path / "step2")), **settings)
    assert len(second) == 2 * times and all(map(torch.equal, whole[2 * times :], second))


def test_start_from_scratch_counts_from_zero(tmp_path):
    first, _ = train(tmp_path, 2)
    again, _ = train(tmp_path, 2, script=dict(load=str(tmp_path / "step2"), start_from_scratch=True))
    assert all(map(torch.equal, first, again))


def test_changed_windows_are_refused_before_anything_is_drawn(tmp_path):
    train(tmp_path, 1)
    script = dict(load=str(tmp_path / "step1"))
    with pytest.raises(ValueError, match=r"windows was \(1\.0, 0\.66.*, now \(1\.0, 0\.5, 0\.0\).*allow_change=True"):
        train(tmp_path, 1, script=script, windows=2)
    assert train(tmp_path, 1, script=script, windows=2, allow_change=True)[1].run.randomness.steps == 2


def test_a_changed_teacher_is_refused(tmp_path):
    train(tmp_path, 1)
    write_state_dict(tmp_path / "other.safetensors", tiny_network(seed=7).state_dict())
    teacher = dict(from_pretrained=str(tmp_path / "other.safetensors"), steps_per_window=1)
    with pytest.raises(ValueError, match=r"teacher was [0-9a-f]{16} \(weights from .*teacher\.safetensors\), now .*other"):
        train(tmp_path, 1, script=dict(load=str(tmp_path / "step1")), teacher=teacher)


def test_a_checkpoint_of_another_scheduler_has_no_state(tmp_path, caplog):
    (tmp_path / "rflow").mkdir()
    with caplog.at_level(logging.INFO):
        _, scheduler = train(tmp_path, 1, script=dict(load=str(tmp_path / "rflow")))
    assert scheduler.run.randomness.steps == 1 and "rflow has no perflow.json" in caplog.text


def test_a_student_of_a_student_is_stage_two(tmp_path):
    assert train(tmp_path, 1)[1].state().stage == 1
    weights = tmp_path / "student.safetensors"
    write_state_dict(weights, tiny_network(seed=5).state_dict(), {METADATA_KEY: STATE.to_json()})
    teacher = dict(from_pretrained=str(weights), allow_distilled=True)
    assert train(tmp_path, 1, teacher=teacher)[1].state().stage == 2


def test_outside_a_script_nothing_is_resumed_or_saved():
    assert resumed_checkpoint() is None and before_each_save(lambda folder: None) is False


@pytest.mark.parametrize("settings, words", [({}, []), (dict(windows=2), ["trained (1.0, 0.66", "asked (1.0, 0.5, 0.0)"])])
def test_sampling_warns_once_where_windows_differ(tmp_path, settings, words, caplog):
    train(tmp_path, 1)
    network = tiny_network()

    def main():
        cfg = SimpleNamespace(get=dict(scheduler=dict(), model=dict(from_pretrained=str(tmp_path / "step1"))).get)
        scheduler = PeRFlow(**{"windows": 3, **settings})
        with torch.no_grad():
            for _ in range(2):
                scheduler.sample(
                    network, text_encoder(network), torch.randn(2, 4, 5, 4, 4), ["a", "b"], additional_args=sizes(2)
                )
        return cfg

    with caplog.at_level(logging.WARNING):
        main()
    warnings = [
        record.getMessage() for record in caplog.records if "other settings than it was trained with" in record.getMessage()
    ]
    assert len(warnings) == bool(words) and all(word in warnings[0] for word in words)


def test_allow_change_is_a_bool():
    with pytest.raises(ValueError, match="allow_change must be True or False, got 'yes'"):
        PeRFlow(allow_change="yes")


def test_a_damaged_file_of_weights_is_named(tmp_path):
    path = tmp_path / "student.safetensors"
    write_state_dict(path, {"a": torch.ones(4)}, {METADATA_KEY: STATE.to_json()})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="student.safetensors' cannot be read as plain tensors"):
        find_state(path)
