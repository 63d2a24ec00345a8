"""PeRFlow through Open-Sora's real train.py, inference.py and inference_i2v.py, with the configs of this repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from _harness import REPOSITORY, Clips, checkpoints, decode_video, mp4_files, needs_half, run_python, run_script

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.worlds.clips import recognise

pytestmark = pytest.mark.host
CONFIGS = REPOSITORY / "configs" / "opensora"


@pytest.fixture(scope="module", autouse=True)
def has_stage_configs(host_tag: str) -> None:
    """This repository's configs are for STDiT3."""
    if host_tag in ("1.0", "1.1"):
        pytest.skip(f"there are no stage configs for Open-Sora {host_tag}; test_iddpm_scripts.py trains its networks")


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss=([-+.\deE]+|nan|inf)", output)]


def child_config(path: Path, base: str, **changes: object) -> Path:
    """A config that inherits one of the repository's and changes some keys, as a user writes it."""
    lines = [f"_base_ = {str(CONFIGS / base)!r}", *(f"{key} = {value!r}" for key, value in changes.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def stage1(host_root: Path, clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """16 training steps on 4 clips in one process: (outputs folder, what was printed)."""
    folder = tmp_path_factory.mktemp("stage1")
    options = ["--data-path", clips.csv, "--outputs", folder / "outputs"]
    printed = run_script(host_root, "train.py", CONFIGS / "perflow_tiny_stage1.py", *options, cwd=folder)
    return folder / "outputs", printed


@pytest.fixture(scope="module")
def stage2(host_root: Path, clips: Clips, stage1: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with guidance folded in, started from stage 1's last."""
    folder = tmp_path_factory.mktemp("stage2")
    options = ["--data-path", clips.csv, "--outputs", folder / "outputs", "--ckpt-path", checkpoints(stage1[0])[-1]]
    run_script(host_root, "train.py", CONFIGS / "perflow_tiny_stage2.py", *options, cwd=folder)
    return checkpoints(folder / "outputs")[-1]


def test_sixteen_steps_train_the_student_and_nothing_else(stage1: tuple[Path, str]) -> None:
    outputs, printed = stage1
    assert [folder.name for folder in checkpoints(outputs)] == ["epoch1-global_step8", "epoch3-global_step16"]
    found = losses(printed)
    assert len(found) >= 16 and np.isfinite(found).all()
    assert "PeRFlow teacher: weights from perflow_tiny_teacher" in printed
    first, last = (read_state_dict(folder) for folder in checkpoints(outputs))
    ema = read_state_dict(checkpoints(outputs)[-1] / "ema.pt")
    assert first.keys() == last.keys() == ema.keys() and not any("teacher" in key for key in last)
    assert any(not torch.equal(first[key], last[key]) for key in last)


def test_stage_1_is_resumed_with_its_own_config(
    host_root: Path, clips: Clips, stage1: tuple[Path, str], tmp_path: Path
) -> None:
    start = checkpoints(stage1[0])[0]
    options = ["--data-path", clips.csv, "--outputs", tmp_path / "outputs", "--load", start]
    printed = run_script(host_root, "train.py", CONFIGS / "perflow_tiny_stage1.py", *options, cwd=tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path / "outputs")] == ["epoch3-global_step16"]
    assert "PeRFlow goes on after 8 training steps" in printed and np.isfinite(losses(printed)).all()


def test_a_resumed_run_needs_a_named_teacher_and_then_goes_on(
    host_root: Path, clips: Clips, stage1: tuple[Path, str], tmp_path: Path
) -> None:
    start = checkpoints(stage1[0])[0]
    options = ["--data-path", clips.csv, "--outputs", tmp_path / "outputs", "--load", start]
    config = child_config(tmp_path / "none.py", "perflow_tiny_stage1.py", scheduler=dict(teacher=dict(from_pretrained=None)))
    with pytest.raises(AssertionError, match="its weights are already those of a student and must not become"):
        run_script(host_root, "train.py", config, *options, cwd=tmp_path)
    assert checkpoints(tmp_path / "outputs") == []
    scheduler = dict(teacher=dict(from_pretrained=str(start), allow_distilled=True))
    config = child_config(tmp_path / "other.py", "perflow_tiny_stage1.py", scheduler=scheduler)
    with pytest.raises(
        AssertionError, match=r"teacher was [0-9a-f]{16} \(weights from perflow_tiny_teacher\), now [0-9a-f]{16}"
    ):
        run_script(host_root, "train.py", config, *options, cwd=tmp_path)
    assert checkpoints(tmp_path / "outputs") == []
    config = child_config(tmp_path / "resume.py", "perflow_tiny_stage1.py", scheduler=dict(scheduler, allow_change=True))
    printed = run_script(host_root, "train.py", config, *options, cwd=tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path / "outputs")] == ["epoch3-global_step16"]
    assert f"PeRFlow teacher: weights from {start}" in printed and np.isfinite(losses(printed)).all()


@needs_half
def test_float16_trains(host_root: Path, clips: Clips, tmp_path: Path) -> None:
    """ZeRO scales the loss; weights move, and stay finite."""
    config = child_config(tmp_path / "half.py", "perflow_tiny_stage1.py", dtype="fp16", epochs=2, ckpt_every=4)
    options = ["--data-path", clips.csv, "--outputs", tmp_path / "outputs"]
    printed = run_script(host_root, "train.py", config, *options, cwd=tmp_path)
    assert np.isfinite(losses(printed)).all()
    first, last = (read_state_dict(folder) for folder in checkpoints(tmp_path / "outputs"))
    assert all(value.isfinite().all() for value in last.values())
    assert any(not torch.equal(first[key], last[key]) for key in last)


def test_two_processes_with_frame_masks(host_root: Path, clips: Clips, tmp_path: Path) -> None:
    masks = {"image_head": 0.5, "random": 0.4}
    # Sixteen samples are held out, one a step in each process, before anything is measured.
    watched = dict(mask_ratios=masks, scheduler=dict(watch=dict(every=3)), epochs=8)
    config = child_config(tmp_path / "two.py", "perflow_tiny_stage1.py", **watched)
    options = ["--data-path", clips.csv, "--outputs", tmp_path / "outputs"]
    printed = run_script(host_root, "train.py", config, *options, nproc=2, cwd=tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path / "outputs")] == ["epoch3-global_step8", "epoch7-global_step16"]
    assert np.isfinite(losses(printed)).all()
    said = r"after (\d+) training steps: held-out error (\d+\.\d+) ± \S+ on 16 samples, of an untrained network (\d+\.\d+)"
    measured = re.findall(said, printed)
    assert [steps for steps, _, _ in measured] == ["9", "12", "15"]  # said by one process
    assert measured[1][1] != measured[2][1] and measured[1][2] == measured[2][2]


@pytest.mark.parametrize("teacher", ["original", "previous"])
def test_two_processes_merge_their_windows_together(host_root: Path, clips: Clips, tmp_path: Path, teacher: str) -> None:
    advance = dict(min_steps=1, max_steps=2)  # a stage ends at its second measurement, after 25 steps
    scheduler = dict(curriculum=dict(windows=[4, 2, 1], teacher=teacher, advance=advance))
    # Two clips for each process, one a step: 56 steps, enough for two stages to end.
    config = child_config(tmp_path / "merge.py", "perflow_tiny_stage2.py", scheduler=scheduler, epochs=28, ckpt_every=56)
    options = ["--data-path", clips.csv, "--outputs", tmp_path / "outputs"]
    printed = run_script(host_root, "train.py", config, *options, nproc=2, cwd=tmp_path)
    ends = re.findall(r"curriculum: (\d) windows -> (\d) after \d+ steps", printed)
    assert sorted(set(ends)) == [("2", "1"), ("4", "2")]
    assert np.isfinite(losses(printed)).all()


@pytest.mark.parametrize("nproc", [1, 2])
def test_image_and_video_conditioning(host_root: Path, host_tag: str, clips: Clips, tmp_path: Path, nproc: int) -> None:
    """With two processes each draws for itself which of its frames are references, and often only one has some."""
    if host_tag != "1.3":
        pytest.skip("mask_types is new in Open-Sora 1.3")
    config = child_config(
        tmp_path / "i2v.py",
        "perflow_tiny_stage2.py",
        epochs=2 * nproc,
        mask_types={"i2v_head": 1, "v2v_head_noisy": 1, "i2v_loop": 1, "none": 1},
        scheduler=dict(x_cond_weight=0.1, guidance=dict(image_scale=2.0)),
        plugin="zero1" if nproc == 1 else "zero2",
        accumulation_steps=3 - nproc,  # upstream's ZeRO-2 takes no accumulation
    )
    options = ["--data-path", clips.csv, "--outputs", tmp_path / "outputs"]
    printed = run_script(host_root, "train.py", config, *options, nproc=nproc, cwd=tmp_path)
    found = losses(printed)
    assert len(found) >= 8 and np.isfinite(found).all()


def test_distillation_without_data(host_root: Path, clips: Clips, tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("\n".join(["text", *clips.captions]) + "\n")  # no videos, and no column for them
    # All of them in one run: each takes the host's batch.
    names = ("direction", "phased", "consistency")
    objective = ["perflow", *(dict(type=f"perflow_{name}", weight=0.2) for name in names)]
    config = child_config(tmp_path / "free.py", "perflow_tiny_data_free.py", epochs=2, scheduler=dict(objective=objective))
    options = ["--data-path", table, "--outputs", tmp_path / "outputs"]
    printed = run_script(host_root, "train.py", config, *options, cwd=tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path / "outputs")] == ["epoch1-global_step8"]
    assert len(losses(printed)) >= 8 and np.isfinite(losses(printed)).all()


def sample(
    host_root: Path, script: str, checkpoint: Path, folder: Path, *options: object, stage: int = 2, **changes: object
) -> np.ndarray:
    base = "perflow_tiny_inference.py" if stage == 1 else "perflow_tiny_inference_stage2.py"
    config = child_config(folder / "sample.py", base, **changes)
    arguments = ["--ckpt-path", checkpoint, "--save-dir", folder / "samples", "--prompt", "a red circle moving right"]
    run_script(host_root, script, config, *arguments, *options, cwd=folder)
    (video,) = mp4_files(folder / "samples")
    return decode_video(video)


def test_few_step_inference(host_root: Path, stage2: Path, tmp_path: Path) -> None:
    assert sample(host_root, "inference.py", stage2, tmp_path, verbose=2).shape == (17, 192, 192, 3)
    printed = (tmp_path / "inference.log").read_text()
    assert "4/4" in printed  # the sampler's progress bar: one step a window
    assert "other settings than it was trained with" not in printed


def test_guided_inference_of_stage_1(host_root: Path, stage1: tuple[Path, str], tmp_path: Path) -> None:
    options = ["--num-sampling-steps", "8", "--cfg-scale", "4.0"]
    video = sample(host_root, "inference.py", checkpoints(stage1[0])[-1], tmp_path, *options, stage=1, verbose=2)
    assert video.shape == (17, 192, 192, 3) and "8/8" in (tmp_path / "inference.log").read_text()
    assert recognise(video) == ("red", "circle", "right")


@pytest.mark.parametrize("joint", [None, dict(edit=0.1, frames=2)])
def test_loops_extend_the_video(host_root: Path, stage2: Path, tmp_path: Path, joint: dict[str, float] | None) -> None:
    options = ["--loop", "2", "--condition-frame-length", "5"]
    changes = dict(num_frames=34, image_size=(192, 192), scheduler=dict(long_video=joint))
    video = sample(host_root, "inference.py", stage2, tmp_path, *options, **changes)
    assert video.shape == (51, 192, 192, 3)  # 34 + 34 frames, 17 of them shared


def test_the_tiny_config_loops(host_root: Path, stage2: Path, tmp_path: Path) -> None:
    video = sample(host_root, "inference.py", stage2, tmp_path, "--loop", "3", image_size=(96, 96))
    assert video.shape[0] == 34 + 17 + 17
    assert "reference frames, so that" not in (tmp_path / "inference.log").read_text()


def test_clips_that_a_loop_shares_whole_are_told(host_root: Path, host_tag: str, stage2: Path, tmp_path: Path) -> None:
    video = sample(host_root, "inference.py", stage2, tmp_path, loop=3, image_size=(96, 96))
    assert video.shape[0] == 17
    told = "all 5 latent frames of a clip are reference frames" in (tmp_path / "inference.log").read_text()
    assert told == (host_tag == "1.2")  # 1.3 shows the next clip no frames without a cond_type


def test_the_config_of_stage_1_samples_a_student_of_stage_2(host_root: Path, stage2: Path, tmp_path: Path) -> None:
    sample(host_root, "inference.py", stage2, tmp_path, stage=1, image_size=(96, 96), verbose=2)
    printed = (tmp_path / "inference.log").read_text()
    assert "PeRFlow samples with 4 windows, 4 steps and guidance mode fixed" in printed
    assert "other settings than it was trained with" not in printed


def test_image_to_video(host_root: Path, host_tag: str, clips: Clips, stage2: Path, tmp_path: Path) -> None:
    if host_tag != "1.3":
        pytest.skip("inference_i2v.py is new in Open-Sora 1.3")
    from PIL import Image

    Image.fromarray(decode_video(clips.videos[0])[0]).save(tmp_path / "reference.png")
    options = ["--cond-type", "i2v_head", "--reference-path", tmp_path / "reference.png"]
    video = sample(host_root, "inference_i2v.py", stage2, tmp_path, *options, use_sdedit=True)
    assert video.shape == (17, 192, 192, 3)


def test_sampler_equals_the_hosts_own(host_root: Path, tmp_path: Path) -> None:
    command = [str(REPOSITORY / "benchmarks" / "sampler_parity.py"), "--open-sora", str(host_root)]
    printed = run_python(command, nproc=1, log=tmp_path / "parity.log", cwd=tmp_path)
    assert "largest absolute difference" in printed


def test_demo_on_the_real_network(host_root: Path, tmp_path: Path) -> None:
    options = ["--iterations", "4", "--num-clips", "4", "--num-samples", "2", "--batch-size", "2", "--out", "out"]
    command = ["-m", "opensora_perflow", "demo", "--open-sora", str(host_root), *options]
    printed = run_python(command, nproc=1, log=tmp_path / "demo.log", cwd=tmp_path)
    assert "student, 4 steps" in printed
    assert json.loads((tmp_path / "out" / "results.json").read_text())["network"] == "opensora.STDiT3"
