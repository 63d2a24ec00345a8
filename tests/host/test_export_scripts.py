"""`opensora-perflow export`: a training's average, sampled and trained on from by unmodified scripts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from _harness import (
    NETWORKS,
    REPOSITORY,
    Clips,
    checkpoints,
    decode_video,
    inference_config,
    mp4_files,
    run_python,
    run_script,
    train_config,
)

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.training.state import find_state

pytestmark = pytest.mark.host
PERFLOW = {"type": "perflow", "windows": 2, "guidance": {"mode": "fixed", "scale": 3.0}, "watch": None}


def export(checkpoint: Path, out: Path, *options: str) -> Path:
    command = ["-m", "opensora_perflow", "export", str(checkpoint), "--out", str(out), *options]
    run_python(command, nproc=1, log=out.with_suffix(".log"), cwd=out.parent)
    return out


@pytest.fixture(scope="module")
def trained(host_root: Path, host_tag: str, clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two processes: the average is kept in shards, and gathered when it is saved."""
    folder = tmp_path_factory.mktemp("export")
    changes = {"ema_decay": 0.5, "epochs": 2, "ckpt_every": 4}
    config = train_config(folder / "train.py", host_tag, clips, PERFLOW, folder / "outputs", **changes)
    run_script(host_root, "train.py", config, nproc=2, cwd=folder)
    return checkpoints(folder / "outputs")[-1]


def test_the_average_is_sampled_by_the_hosts_script(host_root: Path, host_tag: str, trained: Path, tmp_path: Path) -> None:
    student, raw = export(trained, tmp_path / "student"), export(trained, tmp_path / "raw", "--no-ema")
    average = torch.load(trained / "ema.pt", weights_only=True)
    written = read_state_dict(student)
    assert written.keys() == average.keys() and all(torch.equal(written[name], average[name]) for name in written)
    assert find_state(student)[0] == find_state(trained)[0]
    assert any(not torch.equal(written[name], value.float()) for name, value in read_state_dict(raw).items())
    videos = {}
    for name, weights in {"student": student, "raw": raw}.items():
        config = inference_config(tmp_path / f"{name}.py", host_tag, {"type": "perflow"}, weights, tmp_path / f"{name}_videos")
        printed = run_script(host_root, "inference.py", config, cwd=tmp_path, log=tmp_path / f"{name}_sample.log")
        if host_tag in ("1.2", "1.3"):  # the others show warnings alone
            assert "PeRFlow samples with 2 windows" in printed
        (video,) = mp4_files(tmp_path / f"{name}_videos")
        videos[name] = decode_video(video).astype(int)
    assert 0 < np.abs(videos["student"] - videos["raw"]).mean()


def test_every_loader_of_the_host_takes_an_export(host_root: Path, host_tag: str, trained: Path, tmp_path: Path) -> None:
    """The tiny networks have a reader of ours; Open-Sora's own factories end in its load_checkpoint."""
    student = export(trained, tmp_path / "student")
    command = [str(REPOSITORY / "tests" / "host" / "_load_worker.py"), str(host_root), str(student), NETWORKS[host_tag]]
    printed = run_python(command, nproc=1, log=tmp_path / "load.log", cwd=tmp_path)
    count = len(read_state_dict(student))
    assert f"loaded {count} of {count} tensors, different: []" in printed
