"""`perflow_lora` through Open-Sora's real train.py and inference.py: one network is student and teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from _harness import REPOSITORY, Clips, checkpoints, decode_video, losses, mp4_files, run_python, run_script

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.training.adapters import is_added
from opensora_perflow.training.state import find_state

pytestmark = pytest.mark.host
CONFIGS = REPOSITORY / "configs" / "opensora"
TRAIN, SAMPLE = CONFIGS / "perflow_tiny_lora.py", CONFIGS / "perflow_tiny_inference.py"


@pytest.fixture(scope="module", autouse=True)
def has_stage_configs(host_tag: str) -> None:
    if host_tag in ("1.0", "1.1"):
        pytest.skip("the config of adapters is for STDiT3")
    pytest.importorskip("peft")


def train(
    root: Path, clips: Clips, folder: Path, *options: object, nproc: int = 2, config: Path = TRAIN
) -> tuple[list[Path], str]:
    """(checkpoints, what was printed) of 4 passes over 4 clips, one a step in each process."""
    arguments = ["--data-path", clips.csv, "--outputs", folder / "outputs", *options]
    printed = run_script(root, "train.py", config, *arguments, nproc=nproc, cwd=folder)
    return checkpoints(folder / "outputs"), printed


def sample(root: Path, folder: Path, weights: Path, config: Path = SAMPLE) -> np.ndarray:
    """One video of the first prompt, uint8 [T, H, W, 3]."""
    options = ["--ckpt-path", weights, "--prompt", "a red circle moving right", "--save-dir", folder / "samples"]
    run_script(root, "inference.py", config, *options, cwd=folder)
    (video,) = mp4_files(folder / "samples")
    return decode_video(video)


@pytest.fixture(scope="module")
def trained(host_root: Path, clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], str]:
    """ZeRO-2 in two processes, 8 steps, saved every fourth."""
    folder = tmp_path_factory.mktemp("lora")
    config = child(folder / "train.py", TRAIN, ckpt_every=4, ema_decay=0.99)
    return train(host_root, clips, folder, config=config)


def child(path: Path, base: Path, **changes: object) -> Path:
    path.write_text("\n".join([f"_base_ = {str(base)!r}", *(f"{key} = {value!r}" for key, value in changes.items())]) + "\n")
    return path


def test_two_processes_train_adapters_alone(trained: tuple[list[Path], str]) -> None:
    (first, last), printed = trained
    assert [folder.name for folder in (first, last)] == ["epoch1-global_step4", "epoch3-global_step8"]
    assert len(losses(printed)) >= 8 and np.isfinite(losses(printed)).all()
    assert "PeRFlow teacher: the network as it was built (from perflow_tiny_teacher)" in printed
    before, after, ema = read_state_dict(first), read_state_dict(last), read_state_dict(last / "ema.pt")
    assert before.keys() == after.keys() == ema.keys() and all(is_added(name) for name in after)
    assert [after[name].shape for name in after] == [ema[name].shape for name in after]
    assert all(ema[name].dtype == torch.float32 for name in ema)
    assert all((after[name] != before[name]).any() for name in after if "lora_B" in name)
    # ema_decay=.99: after 8 steps the average has gone less than a tenth of the way.
    ups = [name for name in after if "lora_B" in name]
    ratio = sum(ema[n].abs().sum() for n in ups) / sum(after[n].abs().sum() for n in ups)
    assert 0 < ratio < 0.1
    size = sum(path.stat().st_size for path in (last / "model").iterdir())
    assert size < 2.2 * sum(value.numel() for value in after.values()) + 60_000  # bf16, names and index
    one, two = (find_state(folder)[0] for folder in (first, last))
    assert one.teacher == two.teacher and one.adapters == two.adapters and one.adapters["rank"] == 16


def test_adapters_are_resumed(host_root: Path, clips: Clips, trained: tuple[list[Path], str], tmp_path: Path) -> None:
    """The rest of the training is that of the unbroken one, but for what bf16 checkpoints round."""
    (first, last), _ = trained
    config = child(tmp_path / "resumed.py", TRAIN, ckpt_every=4, ema_decay=0.99)
    found, printed = train(host_root, clips, tmp_path, "--load", first, config=config)
    assert [folder.name for folder in found] == ["epoch3-global_step8"]
    assert "PeRFlow goes on after 4 training steps" in printed
    for name in ("model", "ema.pt"):
        start, whole, again = (read_state_dict(folder / name) for folder in (first, last, found[0]))
        for up in (name for name in whole if "lora_B" in name):
            way = (whole[up].float() - start[up].float()).norm()
            assert (again[up].float() - whole[up].float()).norm() < 0.15 * way, up
    assert find_state(found[0])[0].teacher == find_state(last)[0].teacher


def test_adapters_and_merged_weights_are_sampled_alike(
    host_root: Path, trained: tuple[list[Path], str], tmp_path: Path
) -> None:
    """By the base's own type from merged weights. The untrained base's samples are others, and those of the EMA in between."""
    last = trained[0][-1]
    folders = {name: tmp_path / name for name in ("adapters", "ema", "merged", "base")}
    for folder in folders.values():
        folder.mkdir()
    lora = CONFIGS / "perflow_tiny_lora_inference.py"
    small = {"image_size": (96, 96)}
    own = child(tmp_path / "lora.py", lora, **small)
    whole = child(tmp_path / "whole.py", SAMPLE, **small, scheduler={"windows": 4, "guidance": {"mode": "fixed", "scale": 3.0}})
    adapters = sample(host_root, folders["adapters"], last, own)
    command = ["-m", "opensora_perflow", "merge", str(last), str(tmp_path / "student"), "--no-ema"]
    command += ["--base", "perflow_tiny_teacher"]
    run_python(command, nproc=1, log=tmp_path / "merge.log", cwd=tmp_path)
    merged = sample(host_root, folders["merged"], tmp_path / "student", whole)
    base = sample(host_root, folders["base"], Path("perflow_tiny_teacher"), whole)
    ema = sample(host_root, folders["ema"], last / "ema.pt", own)
    apart, learned, averaged = (
        np.abs(a.astype(int) - b).mean() for a, b in ((adapters, merged), (adapters, base), (ema, base))
    )
    assert apart < learned / 20  # rounding, which the encoder of the video may spread
    assert 0 < averaged < learned


def test_what_does_not_belong_together_is_refused_before_anything_is_written(
    host_root: Path, clips: Clips, trained: tuple[list[Path], str], tmp_path: Path
) -> None:
    last, folders = trained[0][-1], [tmp_path / str(i) for i in range(3)]
    for folder in folders:
        folder.mkdir()
    with pytest.raises(
        AssertionError, match="--load .* holds adapters .LoRA. alone, and the config's model is a whole network"
    ):
        train(host_root, clips, folders[0], "--load", last, nproc=1, config=CONFIGS / "perflow_tiny_stage2.py")
    named = child(folders[1] / "c.py", TRAIN, scheduler={"teacher": {"from_pretrained": "perflow_tiny_teacher"}})
    with pytest.raises(AssertionError, match="teacher.from_pretrained='perflow_tiny_teacher' and model=.* exclude each other"):
        train(host_root, clips, folders[1], nproc=1, config=named)
    other = child(folders[2] / "c.py", TRAIN, model={"rank": 4})
    with pytest.raises(AssertionError, match="the checkpoint holds other adapters than this network's"):
        train(host_root, clips, folders[2], "--load", last, nproc=1, config=other)
    assert not any(checkpoints(folder / "outputs") for folder in folders)
