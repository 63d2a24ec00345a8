"""PeRFlow on epsilon networks through the real scripts: Open-Sora 1.0 and 1.1, and STDiT2 under 1.2 and 1.3."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from _harness import (
    NETWORKS,
    Clips,
    checkpoints,
    decode_video,
    inference_config,
    mp4_files,
    run_script,
    sampling_scheduler,
    train_config,
)

from opensora_perflow.checkpoints import read_state_dict

pytestmark = pytest.mark.host
TRAINING = {"type": "perflow", "timestep_respacing": "", "teacher": {"steps_per_window": 2}, "watch": {"every": 1}}
"""The scheduler of the shipped training configs, dict(type="iddpm", timestep_respacing=""), as perflow: with a fast
teacher, and measured after every step."""


def network(tag: str, **settings: object) -> dict[str, object]:
    """The epsilon network of a tag: its own, or STDiT2 under 1.2 and 1.3, whose own STDiT3 is a rectified flow's."""
    if tag == "1.0":
        return {"type": NETWORKS[tag], "from_pretrained": None, **settings}
    flags = {"qk_norm": True, "enable_flash_attn": False, "enable_layernorm_kernel": False}
    return {"type": "perflow_tiny_stdit2", "from_pretrained": None, **flags, **settings}


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss=([-+.\deE]+|nan|inf)", output)]


def measured(output: str) -> list[str]:
    """The training steps after which the run measured its student."""
    return re.findall(r"after (\d+) training steps: held-out error \d", output)


@pytest.fixture(scope="module")
def trained(host_root: Path, host_tag: str, clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two epochs of four steps in one process: (outputs folder, what was printed)."""
    folder = tmp_path_factory.mktemp(f"iddpm{host_tag}")
    config = train_config(folder / "train.py", host_tag, clips, TRAINING, folder / "outputs", model=network(host_tag), epochs=2)
    return folder / "outputs", run_script(host_root, "train.py", config, cwd=folder)


def test_an_epsilon_student_trains(trained: tuple[Path, str]) -> None:
    outputs, printed = trained
    assert [folder.name.split("-")[1] for folder in checkpoints(outputs)] == [f"global_step{n}" for n in (2, 4, 6, 8)]
    found = losses(printed)
    assert len(found) >= 8 and np.isfinite(found).all()
    assert measured(printed) == [str(n) for n in range(1, 8)]
    assert "PeRFlow teacher: a copy of the student's weights at this run's first step" in printed
    first, last = (read_state_dict(checkpoints(outputs)[i]) for i in (0, -1))
    assert first.keys() == last.keys() and not any("teacher" in key for key in last)
    assert any(not torch.equal(first[key], last[key]) for key in last)


def test_frame_masks_in_two_processes(host_root: Path, host_tag: str, clips: Clips, tmp_path: Path) -> None:
    masks = {"1.0": {}, "1.1": {"mask_ratios": {"mask_image_head": 0.7, "mask_no": 0.3}}}
    masks = masks.get(host_tag, {"mask_ratios": {"image_head": 0.7}})
    config = train_config(
        tmp_path / "train.py", host_tag, clips, TRAINING, tmp_path / "outputs", model=network(host_tag), **masks
    )
    printed = run_script(host_root, "train.py", config, nproc=2, cwd=tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path / "outputs")] == ["epoch0-global_step2"]
    assert np.isfinite(losses(printed)).all() and measured(printed) == ["1"]


def sample(
    host_root: Path, host_tag: str, checkpoint: Path, folder: Path, scheduler: dict[str, object], script: str = "inference.py",
    **changes: object,
) -> tuple[np.ndarray, str]:  # fmt: skip
    # v1.0 writes model_ckpt.pt into the checkpoint that it loads: it is given a copy.
    copy = shutil.copytree(checkpoint, folder / "checkpoint")
    settings = {"model": network(host_tag, from_pretrained=str(copy)), **changes}
    config = inference_config(folder / "sample.py", host_tag, scheduler, copy, folder / "samples", **settings)
    printed = run_script(host_root, script, config, cwd=folder)
    (video,) = mp4_files(folder / "samples")
    return decode_video(video), printed


def test_few_step_inference(host_root: Path, host_tag: str, trained: tuple[Path, str], tmp_path: Path) -> None:
    scheduler = {"type": "perflow", "num_sampling_steps": 8, "cfg_scale": 7.0, "path": "ddpm"}
    video, printed = sample(host_root, host_tag, checkpoints(trained[0])[-1], tmp_path, scheduler)
    assert video.shape == (17, 64, 64, 3)
    assert host_tag in ("1.2", "1.3") or "8/8" in printed  # the sampler's progress bar


def test_the_student_stays_sampleable_by_iddpm(
    host_root: Path, host_tag: str, trained: tuple[Path, str], tmp_path: Path
) -> None:
    scheduler = sampling_scheduler("1.1")
    video, _ = sample(host_root, host_tag, checkpoints(trained[0])[-1], tmp_path, scheduler)
    assert video.shape == (17, 64, 64, 3)


def test_long_video(host_root: Path, host_tag: str, trained: tuple[Path, str], tmp_path: Path) -> None:
    if host_tag == "1.0":
        pytest.skip("long video is new in Open-Sora 1.1")
    script = "inference-long.py" if host_tag == "1.1" else "inference.py"
    scheduler = {"type": "perflow", "cfg_scale": 7.0, "cfg_channel": 3}
    changes = {"loop": 2, "condition_frame_length": 5, "num_frames": 34, "reference_path": None, "mask_strategy": None}
    if host_tag != "1.1":
        changes = {"loop": 2, "condition_frame_length": 5, "num_frames": 34}
    video, _ = sample(host_root, host_tag, checkpoints(trained[0])[-1], tmp_path, scheduler, script, **changes)
    assert video.shape[0] > 34 and video.shape[1:] == (64, 64, 3)
