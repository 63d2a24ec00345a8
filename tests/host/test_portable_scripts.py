"""Open-Sora's real train.py and inference.py, with its own scheduler, on a machine without CUDA."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from _harness import (
    OWN_SCHEDULER,
    SKIP_REASON,
    Clips,
    checkpoints,
    decode_video,
    host_roots,
    inference_config,
    losses,
    mp4_files,
    run_python,
    run_script,
    sampling_scheduler,
    train_config,
)

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def trained(host_root: Path, host_tag: str, clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One epoch of four steps in one process without torchrun: (outputs folder, what was printed)."""
    folder = tmp_path_factory.mktemp(f"trained{host_tag}")
    config = train_config(folder / "train.py", host_tag, clips, OWN_SCHEDULER[host_tag], folder / "outputs")
    return folder / "outputs", run_script(host_root, "train.py", config, cwd=folder)


def model_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    shards = sorted((checkpoint / "model").glob("*.bin"))
    return {k: v for shard in shards for k, v in torch.load(shard, weights_only=True).items()}


def test_train_writes_checkpoints(trained: tuple[Path, str]) -> None:
    outputs, printed = trained
    assert [folder.name for folder in checkpoints(outputs)] == ["epoch0-global_step2", "epoch0-global_step4"]
    found = losses(printed)
    assert len(found) >= 4 and np.isfinite(found).all()
    first, last = (model_weights(folder) for folder in checkpoints(outputs))
    assert all(torch.isfinite(value).all() for value in last.values())
    assert any(not torch.equal(first[name], last[name]) for name in last)
    ema = torch.load(checkpoints(outputs)[-1] / "ema.pt", weights_only=True)
    assert ema.keys() == last.keys() and ema["x_embedder.proj.weight"].dtype == torch.float32


def test_every_adaptation_says_so_once(trained: tuple[Path, str], host_tag: str) -> None:
    names = re.findall(r"portable (\w+): ", trained[1])
    assert len(names) == len(set(names))
    if not torch.cuda.is_available():
        expected = {"script_assert", "process_group", "cpu_accelerator", "zero_optimizer", "adam", "text_dropout"}
        assert expected <= set(names)
        assert ("zero_stores" in names) == (host_tag != "1.3")


def test_train_resumes(host_root: Path, host_tag: str, clips: Clips, trained: tuple[Path, str], tmp_path: Path) -> None:
    config = train_config(tmp_path / "train.py", host_tag, clips, OWN_SCHEDULER[host_tag], tmp_path / "outputs")
    printed = run_script(host_root, "train.py", config, "--load", checkpoints(trained[0])[0], cwd=tmp_path)
    assert "at epoch 0 step 2" in printed
    assert [folder.name for folder in checkpoints(tmp_path / "outputs")] == ["epoch0-global_step4"]


@pytest.mark.parametrize("plugin", ["zero1", "zero2"])
def test_train_in_two_processes(host_root: Path, host_tag: str, clips: Clips, plugin: str, tmp_path: Path) -> None:
    if host_tag != "1.3" and plugin == "zero1":
        pytest.skip(f"Open-Sora {host_tag} offers ZeRO-2 only")
    masks = {} if host_tag in ("1.0", "1.1") else {"mask_ratios": {"random": 0.5}}
    config = train_config(
        tmp_path / "train.py", host_tag, clips, OWN_SCHEDULER[host_tag], tmp_path / "outputs", plugin=plugin, **masks
    )
    printed = run_script(host_root, "train.py", config, nproc=2, cwd=tmp_path)
    assert [folder.name for folder in checkpoints(tmp_path / "outputs")] == ["epoch0-global_step2"]
    assert np.isfinite(losses(printed)).all()
    assert len(re.findall("portable script_assert: ", printed)) == 1  # one process of a node speaks


def test_zero_on_a_cpu_is_adamw(tmp_path: Path) -> None:
    if not host_roots():
        pytest.skip(SKIP_REASON)
    worker = Path(__file__).with_name("_zero_worker.py")
    printed = run_python([str(worker)], nproc=2, log=tmp_path / "worker.log", cwd=tmp_path)
    assert "rank 0 agrees" in printed and "rank 1 agrees" in printed


def test_inference_from_checkpoint(host_root: Path, host_tag: str, trained: tuple[Path, str], tmp_path: Path) -> None:
    checkpoint = checkpoints(trained[0])[-1]
    config = inference_config(tmp_path / "sample.py", host_tag, sampling_scheduler(host_tag), checkpoint, tmp_path / "samples")
    printed = run_script(host_root, "inference.py", config, cwd=tmp_path)
    (video,) = mp4_files(tmp_path / "samples")
    assert decode_video(video).shape == (17, 64, 64, 3)
    assert "Distributed environment is initialized" not in printed


def test_image_to_video(host_root: Path, host_tag: str, clips: Clips, trained: tuple[Path, str], tmp_path: Path) -> None:
    if host_tag != "1.3":
        pytest.skip("inference_i2v.py is new in Open-Sora 1.3")
    from PIL import Image

    Image.fromarray(decode_video(clips.videos[0])[0]).save(tmp_path / "reference.png")
    checkpoint = checkpoints(trained[0])[-1]
    config = inference_config(tmp_path / "sample.py", host_tag, sampling_scheduler(host_tag), checkpoint, tmp_path / "samples")
    options = ["--cond-type", "i2v_head", "--reference-path", tmp_path / "reference.png"]
    run_script(host_root, "inference_i2v.py", config, *options, cwd=tmp_path)
    (video,) = mp4_files(tmp_path / "samples")
    assert decode_video(video).shape == (17, 64, 64, 3)


def test_checkout_is_untouched(host_root: Path, trained: tuple[Path, str]) -> None:
    if not (host_root / ".git").exists():
        pytest.skip("this checkout is not a git repository")
    command = ["git", "-C", str(host_root), "status", "--porcelain"]
    status = subprocess.run(command, capture_output=True, text=True, check=True)
    assert status.stdout == ""
