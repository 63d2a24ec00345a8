"""Stored chains and encoded texts through Open-Sora 2.0's real train.py: no teacher, no T5, no CLIP, no VAE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from _harness import REPOSITORY, Clips, checkpoints, losses, run_python, run_script

from opensora_perflow.checkpoints import read_state_dict

pytestmark = pytest.mark.host
CONFIGS = REPOSITORY / "configs" / "opensora" / "v2" / "train"
TABLE = ["path,text,num_frames,height,width,fps"] + [
    f",a {color} circle moving {way},10,64,64,24" for color in ("red", "green", "blue") for way in ("right", "left")
]


def start(root: Path, folder: Path, command: str, config: str, table: Path | str, *options: str, nproc: int = 1) -> str:
    """Run `opensora-perflow command` on a config, in `folder`."""
    arguments = ["-m", "opensora_perflow", command, str(CONFIGS / config), "--data-path", str(table)]
    return run_python([*arguments, "--open-sora", str(root), *options], nproc=nproc, log=folder / f"{command}.log", cwd=folder)


def train(root: Path, folder: Path, config: Path, name: str, *options: object, nproc: int = 1) -> str:
    arguments = ("--outputs", name, "--exp_name", name, *options)
    return run_script(root, "diffusion/train.py", config, *arguments, cwd=folder, nproc=nproc, log=folder / f"{name}.log")


def child(path: Path, base: str, **changes: object) -> Path:
    path.write_text("\n".join([f"_base_ = {str(CONFIGS / base)!r}", *(f"{key} = {value!r}" for key, value in changes.items())]))
    return path


@pytest.fixture(scope="module")
def stored(host2_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of 12 chains, each text twice, begun by one process and gone on with by two."""
    folder = tmp_path_factory.mktemp("stored2")
    (folder / "captions.csv").write_text("\n".join(TABLE) + "\n")
    said = start(host2_root, folder, "store", "perflow_tiny.py", "captions.csv", "--out", "store")
    assert '6 chains are in store: model = dict(perflow=dict(teacher=dict(stored="store"), ...))' in said
    more = ("--out", "store", "--grow", "6")
    assert "12 chains are in store" in start(host2_root, folder, "store", "perflow_tiny.py", "captions.csv", *more, nproc=2)
    return folder


@pytest.fixture(scope="module")
def trained(host2_root: Path, stored: Path) -> tuple[Path, str]:
    """Two epochs of six steps, in the folder of the store: (outputs, what was printed)."""
    return stored / "whole", train(host2_root, stored, CONFIGS / "perflow_tiny_stored.py", "whole")


def test_a_training_from_files_alone(trained: tuple[Path, str]) -> None:
    outputs, printed = trained
    assert "PeRFlow trains from 12 stored chains in store (the network as it was built (random weights))" in printed
    assert "the student has that teacher's weights" in printed
    assert "autoencoder" not in printed and np.isfinite(losses(printed)).all()
    assert "after 8 training steps: held-out error" in printed
    state = json.loads((checkpoints(outputs)[-1] / "perflow.json").read_text())
    assert state["steps"] == 12 and state["teacher_source"].startswith("12 stored chains")
    assert state["guidance"]["scale"] == [6.98, 4.38, 4.12, 4.12] and state["windows"] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_it_is_resumed_exactly(host2_root: Path, stored: Path, trained: tuple[Path, str]) -> None:
    options = ("--load", checkpoints(trained[0])[1])
    printed = train(host2_root, stored, CONFIGS / "perflow_tiny_stored.py", "resumed", *options)
    assert "PeRFlow goes on after 4 training steps" in printed
    assert losses(printed)[-1] == losses(trained[1])[-1]
    first, second = ((checkpoints(folder)[-1] / "perflow.json").read_text() for folder in (trained[0], stored / "resumed"))
    assert first == second


def test_a_store_that_grows_in_training(
    host2_root: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes pass 6 chains, and then as many of 12: train.py keeps a pass's length. A run that goes on in the second
    pass, which is then twice as long, takes the same batches."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    shutil.copytree(stored / "store", tmp_path / "store")
    (tmp_path / "store" / "index-00001.json").rename(tmp_path / "store" / "hidden.json")
    imports, runs = ["opensora_perflow", "opensora_perflow.hosts.stored"], []
    buckets = {"_delete_": True, "64px": {9: (1.0, 1)}}
    for name, probe in (("whole", ["_growing_probe"]), ("resumed", [])):
        changes = dict(custom_imports=dict(imports=imports + probe, allow_failed_imports=False), bucket_config=buckets)
        config = child(tmp_path / f"{name}.py", "perflow_tiny_stored.py", epochs=2, ckpt_every=1, **changes)
        options = () if name == "whole" else ("--load", runs[0][3])
        printed = train(host2_root, tmp_path, config, name, *options, nproc=2)
        assert ("trains from 12 chains of store now, 6 more" in printed) == (name == "whole")
        runs.append(checkpoints(tmp_path / name))
    assert len(runs[0]) == 3 + 3 and len(runs[1]) == 6 - 1
    pair = runs[0][5], runs[1][1]
    assert [json.loads((run / "perflow.json").read_text())["steps"] for run in pair] == [6, 6]
    weights = [read_state_dict(run) for run in pair]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_adapters_in_two_processes(host2_root: Path, stored: Path) -> None:
    lora = dict(r=4, lora_alpha=8, target_modules=["q_proj", "proj"])
    printed = train(host2_root, stored, child(stored / "lora.py", "perflow_tiny_stored.py", lora_config=lora), "lora", nproc=2)
    assert "the student has that teacher's weights" in printed and np.isfinite(losses(printed)).all()
    assert (checkpoints(stored / "lora")[-1] / "lora").is_dir()


def test_what_does_not_fit_is_refused_before_anything_is_built(host2_root: Path, stored: Path) -> None:
    config = child(stored / "other.py", "perflow_tiny_stored.py", model=dict(perflow=dict(flow_shift=3.0)))
    with pytest.raises(AssertionError, match="than this training has: transform is") as raised:
        train(host2_root, stored, config, "other")
    assert "Building models" not in str(raised.value)
    encoded = sorted((stored / "store" / "text").iterdir())
    (stored / "more.csv").write_text("\n".join([*TABLE, TABLE[-1].replace("blue", "white")]) + "\n")
    scale = dict(model=dict(perflow=dict(guidance=dict(mode="fixed", scale=5.0))))
    config = child(stored / "scale.py", "perflow_tiny.py", **scale)
    with pytest.raises(AssertionError, match="was begun with other settings: guidance is"):
        start(host2_root, stored, "store", str(config), "more.csv", "--out", "store")
    assert sorted((stored / "store" / "text").iterdir()) == encoded


def test_given_frames_are_refused(host2_root: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("\n".join(TABLE) + "\n")
    with pytest.raises(
        AssertionError, match="condition_config has i2v_head, i2v_loop, i2v_tail, and stored chains are text to"
    ):
        start(host2_root, tmp_path, "store", "perflow_tiny_i2v.py", "captions.csv", "--out", "store")


def test_online_training_without_text_encoders(
    host2_root: Path, small_clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are those with both."""
    monkeypatch.setenv("TQDM_MININTERVAL", "0")  # else the bar leaves out the losses of fast steps
    said = start(host2_root, tmp_path, "encode", "perflow_tiny.py", small_clips.csv, "--out", "text")
    assert 't5 = dict(_delete_=True, type="perflow_encoded_t5", folder="text"); clip = dict(' in said
    text = {name: dict(_delete_=True, type=f"perflow_encoded_{name}", folder="text") for name in ("t5", "clip")}
    config, options = child(tmp_path / "text.py", "perflow_tiny.py", epochs=1, **text), ("--dataset.data-path", small_clips.csv)
    encoded = train(host2_root, tmp_path, config, "encoded", *options)
    both = train(host2_root, tmp_path, child(tmp_path / "both.py", "perflow_tiny.py", epochs=1), "both", *options)
    assert losses(encoded) == losses(both) and len(losses(both)) >= 4


def test_a_store_over_clips(host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    """A clip that cannot be read is left out."""
    diffused = dict(model=dict(perflow=dict(draws=dict(starts="diffused"))))
    config = child(tmp_path / "clips.py", "perflow_tiny.py", **diffused)
    lines = small_clips.csv.read_text().splitlines()
    lines.append(lines[-1].replace(str(small_clips.videos[-1]), str(tmp_path / "missing.mp4")))
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    assert "8 chains are in store" in start(host2_root, tmp_path, "store", str(config), "clips.csv", "--out", "store")
    printed = train(host2_root, tmp_path, child(tmp_path / "train.py", "perflow_tiny_stored.py", **diffused), "over")
    assert "PeRFlow trains from 8 stored chains in store" in printed and np.isfinite(losses(printed)).all()
    assert printed.count("held-out") == printed.count("measures no held-out error") == 1 and checkpoints(tmp_path / "over")
