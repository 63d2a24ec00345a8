"""`opensora-perflow export`, and the average that it writes."""

import json

import pytest
import torch

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.tools.cli import main
from opensora_perflow.training.ema import HORIZON, Ema, decay_of
from opensora_perflow.training.state import StudentState, averages_beside, find_state, raw_weights, write_state

STATE = StudentState(
    windows=(1.0, 0.5, 0.0), transform=None, path="linear", prediction="velocity", guidance=dict(mode="fixed", scale=3.0),
    steps=100,
)  # fmt: skip
RAW = {"a.weight": torch.arange(6.0).view(2, 3).bfloat16(), "b": torch.full((5,), torch.nan)}
AVERAGE = {"a.weight": torch.arange(6.0).view(2, 3) / 7, "b": torch.full((5,), torch.nan)}  # a buffer may hold NaN


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "run" / "epoch0-global_step100"
    (folder / "model").mkdir(parents=True)
    torch.save(RAW, folder / "model" / "pytorch_model.bin")
    torch.save(AVERAGE, folder / "ema.pt")
    write_state(folder, STATE)
    return folder


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name].nan_to_num(9), other[name].nan_to_num(9)) for name in one)


def test_an_average_is_its_own_sum():
    """Three updates with decay 1/2 of 0 by 8: 4, 6, 7; bfloat16 would lose the sum of 256 and 1/2."""
    ema = Ema({"w": torch.zeros(2)}, 0.5)
    for expected in (4.0, 6.0, 7.0):
        ema.update({"w": torch.full((2,), 8.0)})
        assert ema.averages["w"].tolist() == [expected] * 2
    ema = Ema({"w": torch.full((1,), 256.0, dtype=torch.bfloat16)}, 0.5)
    ema.update({"w": torch.full((1,), 257.0)})
    assert ema.averages["w"].item() == 256.5


def test_the_rule_reaches_back_a_share_of_the_run():
    assert 1 / (1 - decay_of(4000)) == pytest.approx(4000 * HORIZON) and decay_of(1) == 0.0


@pytest.mark.parametrize("options, expected", [([], AVERAGE), (["--ema"], AVERAGE), (["--no-ema"], RAW)])
def test_an_export_is_a_checkpoint_with_its_windows(checkpoint, tmp_path, options, expected, capsys):
    out = tmp_path / "student"
    assert main(["export", str(checkpoint), "--out", str(out), *options]) == 0
    assert f"--ckpt-path (Open-Sora 2.0: --ckpt_path) {out}" in capsys.readouterr().out
    assert {path.relative_to(out).as_posix() for path in out.rglob("*")} == {"model", "model/model.safetensors", "perflow.json"}
    assert same(read_state_dict(out), expected)
    assert find_state(out)[0] == find_state(out / "model" / "model.safetensors")[0] == STATE
    assert {path.name for path in tmp_path.iterdir()} == {"run", "student"}


def test_adapters_of_2_0_stay_beside_their_config(tmp_path):
    folder = tmp_path / "epoch0-global_step100"
    (folder / "lora").mkdir(parents=True)
    torch.save(RAW, folder / "lora" / "adapter_model.bin")
    (folder / "lora" / "adapter_config.json").write_text('{"r": 4}')
    torch.save(AVERAGE, folder / "ema.pt")
    write_state(folder, STATE)
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert same(read_state_dict(tmp_path / "out" / "lora" / "adapter_model.safetensors"), AVERAGE)
    assert (tmp_path / "out" / "lora" / "adapter_config.json").read_text() == '{"r": 4}'
    assert find_state(tmp_path / "out" / "lora")[0] == STATE


FAULTS = {
    "no average": "holds no averaged weights: its training had no ema_decay; --no-ema writes those of its last step",
    "no state": "has no perflow.json",
    "a file": "is no folder; name the folder epochE-global_stepG",
    "out exists": "exists; name a file or folder that does not",
    "out is a file": "an export is a folder, got --out",
    "a shard": r"a.weight is [6], there [2, 3]",
    "another network": "c is [1], there missing",
    "bfloat16": "is bfloat16, in which an average does not move",
    "diverged": "holds NaN or infinity in a.weight",
    "damaged": "damaged or incomplete",
    "code": "cannot be read as plain tensors",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_input_is_one_sentence_and_nothing_is_written(checkpoint, tmp_path, fault, capsys):
    file, out, source = checkpoint / "ema.pt", tmp_path / "out", checkpoint
    changed = {
        "a shard": {**AVERAGE, "a.weight": torch.zeros(6)},
        "another network": {**AVERAGE, "c": torch.zeros(1)},
        "bfloat16": {name: value.bfloat16() for name, value in AVERAGE.items()},
        "diverged": {**AVERAGE, "a.weight": torch.full((2, 3), torch.inf)},
        "code": {"a.weight": print},
    }
    if fault in changed:
        torch.save(changed[fault], file)
    elif fault == "no average":
        file.unlink()
    elif fault == "no state":
        (checkpoint / "perflow.json").unlink()
    elif fault == "a file":
        source = file
    elif fault == "out exists":
        out.mkdir()
    elif fault == "out is a file":
        out = tmp_path / "out.safetensors"
    elif fault == "damaged":
        file.write_bytes(file.read_bytes()[:-50])
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", str(source), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert FAULTS[fault] in said and said.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("config, share", [({"ema_decay": 0.99}, "37%"), ({}, "99%"), ({"ema_decay": 0.9}, None)])
def test_an_average_that_is_still_the_teacher_is_told(checkpoint, tmp_path, config, share, caplog):
    """.99^100 = .366; 1.0 and 1.1 have no such key, and .9999: .9999^100 = .990; .9^100 is nothing."""
    (checkpoint.parent / "config.txt").write_text(json.dumps(config))
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    told = [record.message for record in caplog.records if "still holds" in record.message]
    assert (share is None and not told) or (len(told) == 1 and f"still holds {share}" in told[0])


def test_the_average_beside_weights_is_found(checkpoint):
    for weights in (checkpoint, checkpoint / "model", str(checkpoint)):
        assert averages_beside(weights).resolve() == (checkpoint / "ema.pt").resolve()
    (checkpoint / "ema.safetensors").touch()
    assert averages_beside(checkpoint).name == "ema.safetensors"  # whole, where Open-Sora 2.0's ema.pt is a shard
    assert averages_beside(checkpoint.parent) is None


def test_sampling_raw_weights_is_warned_of(checkpoint, tmp_path):
    assert f"their average is in ema.pt and errs less: opensora-perflow export {checkpoint}" in raw_weights(checkpoint)
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    assert raw_weights(tmp_path / "out") is None
