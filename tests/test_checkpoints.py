import json
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from opensora_perflow.checkpoints import misfits, read_metadata, read_state_dict, write_state_dict

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
        raise OSError("no network,\nno snapshot")

    hub.snapshot_download = offline
    with pytest.raises(ValueError, match="could not be fetched from the Hugging Face Hub .*no network, no snapshot"):
        read_state_dict("owner/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="huggingface_hub, which would fetch it, is not installed"):
        read_state_dict("owner/name")


def write_shards(folder, state, kind="safetensors", stem="model"):
    """Shards of one tensor each, and their index, as Hugging Face's and ColossalAI's writers name them."""
    names = {key: f"{stem}-{i:05d}-of-{len(state):05d}.{kind}" for i, key in enumerate(state)}
    for key, name in names.items():
        save_file({key: state[key]}, folder / name) if kind == "safetensors" else torch.save({key: state[key]}, folder / name)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": names}))


OLD = {key: value + 1 for key, value in STATE.items()}


def test_a_whole_file_beats_indices(tmp_path, caplog):
    save_file(STATE, tmp_path / "model.safetensors")
    write_shards(tmp_path, OLD)
    write_shards(tmp_path, OLD, "bin", "pytorch_model")
    (tmp_path / "adapter.safetensors.index.json").write_text("{")
    same(read_state_dict(tmp_path))
    assert "taking model.safetensors, not model.safetensors.index.json, pytorch_model.bin.index.json" in caplog.text
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}')
    same(read_state_dict(tmp_path))


def test_old_bin_files_are_not_taken_silently(tmp_path):
    write_shards(tmp_path, OLD, "bin", "pytorch_model")
    write_shards(tmp_path, STATE)
    same(read_state_dict(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="holds pytorch_model.bin.index.json beside model-00000-of-00002.safetensors"):
        read_state_dict(tmp_path)
    same({key: value - 1 for key, value in read_state_dict(tmp_path / "pytorch_model.bin.index.json").items()})  # asked for


def test_variants_do_not_win(tmp_path):
    save_file(OLD, tmp_path / "model.fp16.safetensors")
    (tmp_path / "model.fp16.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="holds model.fp16.safetensors, .*name the file"):
        read_state_dict(tmp_path)
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    same(read_state_dict(tmp_path))


def test_a_broken_model_folder_does_not_give_way_to_the_folder_above(tmp_path):
    torch.save(OLD, tmp_path / "pytorch_model.bin")
    (tmp_path / "model").mkdir()
    save_file(STATE, tmp_path / "model" / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="model-00001-of-00002"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_prefixes_of_wrappers(tmp_path, prefix):
    torch.save({prefix + key: value for key, value in STATE.items()}, tmp_path / "model.pt")
    same(read_state_dict(tmp_path / "model.pt"))
    torch.save({f"{prefix}a.weight": STATE["a.weight"], "b": STATE["b"]}, tmp_path / "part.pt")
    if not prefix.startswith("module."):  # a network may have a part of that name
        same(read_state_dict(tmp_path / "part.pt"))


def test_prefixes_in_shards(tmp_path):
    write_shards(tmp_path, {"module." + key: value for key, value in STATE.items()})
    same(read_state_dict(tmp_path))


def test_one_tensor_under_two_names_is_refused(tmp_path):
    torch.save({"b": STATE["b"], "_orig_mod.b": STATE["b"]}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="twice, with and without a wrapper's prefix: b, _orig_mod.b"):
        read_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize("nest", ["model", "module", "model_state_dict"])
def test_nests(tmp_path, nest):
    torch.save({"epoch": 3, "optimizer": {"state": {}}, nest: {"state_dict": STATE}}, tmp_path / "model.pt")
    same(read_state_dict(tmp_path / "model.pt"))


def test_other_nests_are_told_with_their_keys(tmp_path):
    torch.save({"epoch": 3, "generator": STATE}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="found the keys epoch, generator; weights are taken from the top or from under ema"):
        read_state_dict(tmp_path / "model.pt")
    endless = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "endless.pt")
    with pytest.raises(ValueError, match="found the keys model"):
        read_state_dict(tmp_path / "endless.pt")
    torch.save([STATE], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="but a list"):
        read_state_dict(tmp_path / "list.pt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_other_than_floating_weights_are_refused(tmp_path, dtype, name):
    state = {**STATE, "c": torch.ones(3).to(dtype)}
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    with pytest.raises(ValueError, match=f"c in .*{name}.* is {dtype}: quantised or no weights"):
        read_state_dict(tmp_path / name)


def test_tensors_that_are_no_weights(tmp_path):
    torch.save({**STATE, "c": torch.eye(2).to_sparse()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="c in .*model.pt.* no dense values"):
        read_state_dict(tmp_path / "model.pt")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="empty.safetensors' holds no tensors"):
        read_state_dict(tmp_path / "empty.safetensors")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "content, told",
    [
        (POINTER, "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"", "is empty"),
        (b"\xff\xfe\x00\xd8", ""),
        (b"[" * 100_000, ""),
        (b'{"weight_map": [1]}', ""),
        (b'{"weight_map": {"a": 1}}', ""),
        (b'{"weight_map": {}}', ""),
    ],
)
def test_files_that_hold_something_else_are_named(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"{name}.*{told}"):
            read_state_dict(source)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_files_are_named(tmp_path, name, kept):
    path = tmp_path / name
    save_file(STATE, path) if name.endswith("safetensors") else torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{name}.*cannot be read as plain tensors .*damaged or incomplete"):
        read_state_dict(path)
    if name.endswith("safetensors"):
        with pytest.raises(ValueError, match=name):
            read_metadata(path)


def test_a_flipped_bit_in_a_torch_file_is_told(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.full((1000,), 3.0)}, path)
    content = bytearray(path.read_bytes())
    content[content.find(torch.full((8,), 3.0).numpy().tobytes()) + 402] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["a"], torch.full((1000,), 3.0))  # torch takes it
    with pytest.raises(ValueError, match="model.pt.*checksum"):
        read_state_dict(path)


def test_shards_that_are_missing_or_belong_to_another_index(tmp_path):
    write_shards(tmp_path, STATE)
    last = tmp_path / "model-00001-of-00002.safetensors"
    save_file({"b": STATE["b"], "c": torch.ones(2)}, last)
    with pytest.raises(ValueError, match="index.json' does not belong to .*00001-of-00002.safetensors': c is in one"):
        read_state_dict(tmp_path)
    save_file({"c": STATE["b"]}, last)
    with pytest.raises(ValueError, match="does not belong to .*: b, c are in one"):
        read_state_dict(tmp_path)
    last.unlink()
    with pytest.raises(
        ValueError, match="model-00001-of-00002.safetensors', which model.safetensors.index.json names, is missing"
    ):
        read_state_dict(tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path):
    save_file(STATE, tmp_path / "outside.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "up").symlink_to(tmp_path)
    torch.save(STATE, folder / "old.bin")
    outside = ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "link.safetensors", "up/outside.safetensors")
    other_kinds = ("old.bin", "", ".", "a\0.safetensors", "c:\\outside.safetensors", "\\\\host\\outside.safetensors")
    for name in (*outside, *other_kinds):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(STATE, name)}))
        with pytest.raises(ValueError, match="index.json' names .* as a shard, which is"):
            read_state_dict(folder)


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_shards(blobs, STATE)
    for i, path in enumerate(sorted(blobs.iterdir())):
        (snapshot / path.name).symlink_to(f"../../blobs/{path.rename(blobs / str(i)).name}")
    same(read_state_dict(snapshot))


def test_paths_are_no_repository_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda repo_id, allow_patterns: pytest.fail(f"asked the hub for {repo_id}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    here = ["outputs/000", "weights/model.safetensors", "run/epoch0-global_step4", "epoch0-global_step4/model", "000-run/model"]
    for path in (*here, "outputs/000/epoch0", "a/b/c", "../x", "/abs", "/abs/x", "~/x", "a/..", "a//b", "a/", "", " ", "a\0/b"):
        with pytest.raises(ValueError, match="no checkpoint at"):
            read_state_dict(path)


def test_misfits_show_keys_of_every_kind():
    network = torch.nn.Linear(2, 3)
    assert misfits(network.state_dict(), network) is None
    broken = {"weight": torch.full((3, 2), torch.nan), "bias": torch.ones(3)}
    assert misfits(broken, network) == "weight holds NaN or infinity, from damage or a training that diverged"
    told = misfits({"model.weight": torch.ones(3, 2), "bias": torch.ones(4)}, network, "the student")
    assert told == "weight is missing; model.weight is not in the student; bias is [4], the student's is [3]"
