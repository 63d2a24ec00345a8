"""Open-Sora 2.0's real train.py and inference.py, with its own network, on a machine without CUDA."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from _harness import Clips, checkpoints, decode_video, losses, mp4_files, run_script
from _harness_v2 import inference_config_v2, train_config_v2
from safetensors.torch import load_file

from opensora_perflow.hosts import install

pytestmark = pytest.mark.host


def test_install_knows_the_checkout(host2_root: Path) -> None:
    assert install.find_tag(host2_root) == "2.0" and install.check(host2_root).record is None


@pytest.fixture(scope="module")
def trained(host2_root: Path, small_clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One epoch of four steps in one process without torchrun: (outputs folder, what was printed)."""
    folder = tmp_path_factory.mktemp("trained2")
    config = train_config_v2(folder / "train.py", small_clips, folder / "outputs", ema_decay=0.99)
    return folder / "outputs", run_script(host2_root, "diffusion/train.py", config, cwd=folder)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {key: value for part in (checkpoint / "model").glob("*.safetensors") for key, value in load_file(part).items()}


def test_train_writes_checkpoints(trained: tuple[Path, str]) -> None:
    outputs, printed = trained
    assert [folder.name for folder in checkpoints(outputs)] == ["epoch0-global_step2", "epoch0-global_step4"]
    found = losses(printed)
    assert len(found) >= 4 and np.isfinite(found).all()
    first, last = (weights(folder) for folder in checkpoints(outputs))
    assert first.keys() == last.keys() and all(torch.isfinite(value).all() for value in last.values())
    assert any(not torch.equal(first[name], last[name]) for name in last)


def test_every_adaptation_says_so_once(trained: tuple[Path, str]) -> None:
    names = re.findall(r"portable (\w+): ", trained[1])
    assert len(names) == len(set(names))
    if not torch.cuda.is_available():
        expected = {"flash_attention", "liger_kernels", "device_setup", "cuda_broadcasts", "compilation", "world_of_one"}
        assert expected <= set(names) and "zero_stores" not in names


def test_train_resumes(host2_root: Path, small_clips: Clips, trained: tuple[Path, str], tmp_path: Path) -> None:
    config = train_config_v2(tmp_path / "train.py", small_clips, tmp_path / "outputs")
    printed = run_script(host2_root, "diffusion/train.py", config, "--load", checkpoints(trained[0])[0], cwd=tmp_path)
    assert "at epoch 0 step 2" in printed
    assert [folder.name for folder in checkpoints(tmp_path / "outputs")] == ["epoch0-global_step4"]


def test_train_in_two_processes_with_visual_conditions(host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    conditions = {"t2v": 1, "i2v_head": 5, "i2v_loop": 1, "i2v_tail": 1}
    config = train_config_v2(tmp_path / "train.py", small_clips, tmp_path / "outputs", condition_config=conditions)
    printed = run_script(host2_root, "diffusion/train.py", config, nproc=2, cwd=tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path / "outputs")] == ["epoch0-global_step2"]
    assert np.isfinite(losses(printed)).all()
    assert len(re.findall("portable device_setup: ", printed)) == 1  # one process of a node speaks
    assert "portable world_of_one: " not in printed


def test_inference_from_checkpoint(host2_root: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    config = inference_config_v2(tmp_path / "sample.py", checkpoints(trained[0])[-1], tmp_path / "samples")
    run_script(host2_root, "diffusion/inference.py", config, cwd=tmp_path)
    (video,) = mp4_files(tmp_path / "samples" / "video_64px")
    assert decode_video(video).shape == (9, 64, 64, 3)
