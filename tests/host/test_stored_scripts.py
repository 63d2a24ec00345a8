"""Stored chains and encoded captions through Open-Sora's real train.py and inference.py: no teacher, no T5, no VAE."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from _harness import REPOSITORY, Clips, checkpoints, decode_video, losses, mp4_files, run_python, run_script

from opensora_perflow.checkpoints import read_state_dict

pytestmark = pytest.mark.host
CONFIGS = REPOSITORY / "configs" / "opensora"
CAPTIONS = [f"a {color} circle moving {way}" for color in ("red", "green", "blue") for way in ("right", "left")]


@pytest.fixture(scope="module", autouse=True)
def has_encoded_text(host_tag: str) -> None:
    if host_tag in ("1.0", "1.1"):
        pytest.skip(f"stores are for Open-Sora 1.2 and 1.3, not {host_tag}")


def child_config(path: Path, base: str, **changes: object) -> Path:
    lines = [f"_base_ = {str(CONFIGS / base)!r}", *(f"{key} = {value!r}" for key, value in changes.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def start(
    host_root: Path,
    folder: Path,
    command: str,
    *options: str,
    nproc: int = 1,
    config: Path = CONFIGS / "perflow_tiny_data_free.py",
    table: Path | str = "captions.csv",
) -> str:
    """Run `opensora-perflow command` on a config, in `folder`."""
    arguments = ["-m", "opensora_perflow", command, str(config), "--data-path", str(table), "--open-sora", str(host_root)]
    arguments += options
    return run_python(arguments, nproc=nproc, log=folder / f"{command}.log", cwd=folder)


@pytest.fixture(scope="module")
def stored(host_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of 12 chains, each caption twice, begun by one process and gone on with by two. Each chain has two
    further solutions of the first window."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "captions.csv").write_text("\n".join(["text", *CAPTIONS]) + "\n")
    options = ("--out", "store", "--first-window", "2")
    assert "6 chains are in store" in start(host_root, folder, "store", *options)
    assert "12 chains are in store" in start(host_root, folder, "store", *options, "--grow", "6", nproc=2)
    return folder


@pytest.fixture(scope="module")
def trained(host_root: Path, stored: Path) -> tuple[Path, str]:
    """24 training steps, in the folder of the store: (outputs, what was printed)."""
    printed = run_script(host_root, "train.py", CONFIGS / "perflow_tiny_stored.py", "--outputs", "outputs", cwd=stored)
    return stored / "outputs", printed


def test_a_training_from_files_alone(host_root: Path, trained: tuple[Path, str]) -> None:
    outputs, printed = trained
    assert "PeRFlow trains from 12 stored chains in store (weights from perflow_tiny_teacher)" in printed
    assert "the student has that teacher's weights" in printed
    assert len(checkpoints(outputs)) == 6 and np.isfinite(losses(printed)).all()
    assert "after 10 training steps: held-out error" in printed
    state = json.loads((checkpoints(outputs)[-1] / "perflow.json").read_text())
    assert state["steps"] == 48 and state["teacher_source"].startswith("12 stored chains")
    first, last = (read_state_dict(folder) for folder in checkpoints(outputs)[:: len(checkpoints(outputs)) - 1])
    assert any(not torch.equal(first[key], last[key]) for key in last)


def test_it_is_resumed_in_two_processes(host_root: Path, stored: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    begin = checkpoints(trained[0])[2]
    options = ["--outputs", str(tmp_path / "outputs"), "--load", str(begin)]
    config = child_config(stored / "two.py", "perflow_tiny_stored.py", scheduler=dict(teacher=dict(from_pretrained=None)))
    printed = run_script(host_root, "train.py", config, *options, nproc=2, cwd=stored, log=tmp_path / "log")
    assert "PeRFlow goes on after 24 training steps" in printed and np.isfinite(losses(printed)).all()
    assert checkpoints(tmp_path / "outputs")


def test_a_store_that_grows_in_training(host_root: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes pass 6 chains, and then 12. A run that goes on in the second pass ends with the same weights. Students are
    told where its steps end."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    shutil.copytree(stored / "store", tmp_path / "store")
    (tmp_path / "store" / "index-00001.json").rename(tmp_path / "store" / "hidden.json")
    imports = ["opensora_perflow", "opensora_perflow.hosts.tiny", "opensora_perflow.hosts.stored"]
    draws = dict(grids=[1, 2], two_time=True)
    scheduler = dict(teacher=dict(from_pretrained=None), watch=None, draws=draws)
    changes = dict(scheduler=scheduler, epochs=2, ckpt_every=1)
    runs = []
    for name, probe in (("whole", ["_growing_probe"]), ("resumed", [])):
        imported = dict(custom_imports=dict(imports=imports + probe, allow_failed_imports=False), **changes)
        config = child_config(tmp_path / f"{name}.py", "perflow_tiny_stored.py", **imported)
        options = [] if name == "whole" else ["--load", str(runs[0][3])]
        log, outputs = tmp_path / f"{name}.log", tmp_path / name
        printed = run_script(host_root, "train.py", config, "--outputs", str(outputs), *options, nproc=2, cwd=tmp_path, log=log)
        assert ("trains from 12 chains of store now, 6 more" in printed) == (name == "whole")
        runs.append(checkpoints(outputs))
    assert len(runs[0]) == 3 + 6 and len(runs[1]) == 5
    states = [json.loads((run[-1] / "perflow.json").read_text()) for run in runs]
    assert states[0]["steps"] == states[1]["steps"] == 9 and states[0]["draws"]["two_time"]
    weights = [read_state_dict(run[-1]) for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_inference_with_encoded_prompts(host_root: Path, stored: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.tiny", "opensora_perflow.hosts.stored"])
    changes = dict(custom_imports=dict(imports, allow_failed_imports=False), save_dir=str(tmp_path / "samples"))
    text = dict(_delete_=True, type="perflow_encoded", folder="store/text")
    size = dict(image_size=(192, 192), num_frames=17, aes=None, fps=24)
    config = child_config(stored / "sample.py", "perflow_tiny_inference_stage2.py", **changes, **size, text_encoder=text)
    options = ["--ckpt-path", str(checkpoints(trained[0])[-1]), "--prompt"]
    run_script(host_root, "inference.py", config, *options, CAPTIONS[0], cwd=stored, log=tmp_path / "log")
    (video,) = mp4_files(tmp_path / "samples")
    assert decode_video(video).shape[1:] == (192, 192, 3)
    with pytest.raises(AssertionError, match="is none of the 6 captions that were encoded in 'store/text'"):
        run_script(host_root, "inference.py", config, *options, "a white star", cwd=stored, log=tmp_path / "log")


def test_what_does_not_fit_is_refused_before_training(host_root: Path, stored: Path, tmp_path: Path) -> None:
    for changes, message in (
        (dict(windows=8), r"has chains with the window edges \[1.0, 0.75"),
        (
            dict(guidance=dict(mode="fixed", scale=5.0)),
            "other guidance than this training has: scale is 3.0 there and 5.0 here",
        ),
        (dict(use_timestep_transform=False), "other settings of the scheduler"),
    ):
        config = child_config(stored / "other.py", "perflow_tiny_stored.py", scheduler=changes)
        with pytest.raises(AssertionError, match=message) as raised:
            run_script(host_root, "train.py", config, "--outputs", str(tmp_path / "outputs"), cwd=stored, log=tmp_path / "log")
        assert "Building models" not in str(raised.value)
    assert not checkpoints(tmp_path / "outputs")
    encoded = sorted((stored / "store" / "text").iterdir())
    with pytest.raises(AssertionError, match="was begun with other settings: captions is"):
        (stored / "captions.csv").write_text("text\na white star\n")
        start(host_root, stored, "store", "--out", "store", "--first-window", "2")
    assert sorted((stored / "store" / "text").iterdir()) == encoded


def test_a_store_over_clips(host_root: Path, clips: Clips, tmp_path: Path) -> None:
    """Two processes read and encode the clips once. A clip that cannot be read is left out; captions alone are refused."""
    draws = dict(scheduler=dict(draws=dict(starts="diffused"), guidance=dict(mode="fixed", scale=3.0)))
    config = child_config(tmp_path / "clips.py", "perflow_tiny_stage2.py", **draws)
    lines = clips.csv.read_text().splitlines()
    (tmp_path / "broken.mp4").write_bytes(clips.videos[0].read_bytes()[:200])
    lines.append(lines[-1].replace(str(clips.videos[-1]), str(tmp_path / "broken.mp4")))
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    store = partial(start, host_root, tmp_path, "store", "--out", "store", config=config, table="clips.csv")
    said = store(nproc=2)
    assert f"{len(clips.videos)} chains are in store" in said and "broken.mp4 is left out" in said
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*.safetensors")}
    store()
    assert written == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*.safetensors")}
    shutil.copy(clips.videos[0], tmp_path / "other.mp4")
    (tmp_path / "others.csv").write_text("\n".join(lines).replace(str(clips.videos[0]), str(tmp_path / "other.mp4")) + "\n")
    with pytest.raises(AssertionError, match="was begun with other settings: clips is"):
        start(host_root, tmp_path, "store", "--out", "store", config=config, table="others.csv")
    train = child_config(tmp_path / "train.py", "perflow_tiny_stored.py", **draws, epochs=2)
    printed = run_script(host_root, "train.py", train, "--outputs", "outputs", cwd=tmp_path)
    assert f"trains from {len(clips.videos)} stored chains" in printed and np.isfinite(losses(printed)).all()
    assert checkpoints(tmp_path / "outputs")
    (tmp_path / "captions.csv").write_text("text\na red circle moving right\n")
    blank = child_config(tmp_path / "blank.py", "perflow_tiny_data_free.py", **draws)
    with pytest.raises(AssertionError, match="this data set has captions alone; name a config and a table of videos"):
        start(host_root, tmp_path, "store", "--out", "other", config=blank)


def test_online_training_without_t5_and_vae(host_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses are those with both: embeddings are kept in train.py's own dtype, and of a blank video the shape counts."""
    monkeypatch.setenv("TQDM_MININTERVAL", "0")  # else the bar leaves out the losses of fast steps
    (tmp_path / "captions.csv").write_text("\n".join(["text", *CAPTIONS]) + "\n")
    start(host_root, tmp_path, "encode", "--out", "text")
    both = (child_config(tmp_path / f"{name}.py", f"perflow_tiny_{name}.py", epochs=1) for name in ("data_free", "encoded"))
    options = ["--data-path", "captions.csv", "--outputs"]
    first, second = (losses(run_script(host_root, "train.py", one, *options, one.stem, cwd=tmp_path)) for one in both)
    assert first == second and len(first) >= 6
