import json
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from opensora_perflow.checkpoints import read_state_dict, write_state_dict

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def same(state):
    assert set(state) == set(STATE) and all(torch.equal(state[key], STATE[key]) for key in STATE)


def test_safetensors_round_trip(tmp_path):
    write_state_dict(tmp_path / "new" / "student.safetensors", STATE, {"windows": "4"})
    same(read_state_dict(tmp_path / "new" / "student.safetensors"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["student.safetensors"]  # nothing temporary is left


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "student.safetensors"
    write_state_dict(path, STATE)
    with pytest.raises(AttributeError):
        write_state_dict(path, {"a": "no tensor"})
    same(read_state_dict(path))
    assert [p.name for p in tmp_path.iterdir()] == ["student.safetensors"]


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin"])
@pytest.mark.parametrize("nest", [None, "ema", "state_dict"])
def test_torch_files(tmp_path, name, nest):
    torch.save(STATE if nest is None else {nest: STATE}, tmp_path / name)
    same(read_state_dict(tmp_path / name))


def test_sharded_folder_of_a_booster(tmp_path):
    model = tmp_path / "epoch0-global_step16" / "model"
    model.mkdir(parents=True)
    keys = list(STATE)
    for i, key in enumerate(keys):
        torch.save({key: STATE[key]}, model / f"pytorch_model-{i:05d}.bin")
    index = {"weight_map": {key: f"pytorch_model-{i:05d}.bin" for i, key in enumerate(keys)}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    same(read_state_dict(model.parent))
    same(read_state_dict(model))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_folder_with_one_file(tmp_path, name):
    save_file(STATE, tmp_path / name) if name.endswith("safetensors") else torch.save(STATE, tmp_path / name)
    same(read_state_dict(tmp_path))


def test_nothing_there_lists_the_accepted_forms(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at .*accepted: an Open-Sora checkpoint folder"):
        read_state_dict(tmp_path / "missing" / "model.pt")
    with pytest.raises(ValueError, match="no weights in the folder"):
        read_state_dict(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        read_state_dict(tmp_path / "notes.txt")


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        read_state_dict(tmp_path / "evil.pt")
    assert "executed" not in capsys.readouterr().out


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict(tmp_path / "state.pt")


def test_repository_ids_go_through_the_hub(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda repo_id, allow_patterns: str(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    same(read_state_dict("owner/name"))

    def offline(repo_id, allow_patterns):
        raise OSError("no network")

    hub.snapshot_download = offline
    with pytest.raises(ValueError, match="could not be fetched from the Hugging Face Hub .*no network"):
        read_state_dict("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="huggingface_hub, which would fetch it, is not installed"):
        read_state_dict("owner/name")
