"""This repository's tiny configs for Open-Sora 2.0, linked into a checkout by install, through its own scripts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from _harness import Clips, checkpoints, decode_video, losses, mp4_files, run_python, run_script
from _harness_v2 import TINY_FLUX
from mmengine import Config

from opensora_perflow.hosts.install import install

pytestmark = pytest.mark.host
TRAIN, INFERENCE = "configs/diffusion/train", "configs/diffusion/inference"


@pytest.fixture(scope="module")
def tree(host2_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with links to our configs."""
    root = tmp_path_factory.mktemp("copy2") / "Open-Sora"
    shutil.copytree(host2_root, root, ignore=shutil.ignore_patterns(".git"))
    install(root)
    return root


def train(root: Path, name: str, clips: Clips, cwd: Path, *arguments: str | Path, epochs: int = 1) -> str:
    config = root / TRAIN / f"{name}.py"
    common = ("--dataset.data-path", clips.csv, "--exp_name", name, "--epochs", epochs, *arguments)
    return run_script(root, "diffusion/train.py", config, *common, cwd=cwd)


def sample(root: Path, cwd: Path, *arguments: str | Path) -> tuple[np.ndarray, str]:
    """Frames of the only video, and what was printed."""
    common = ("--prompt", "a red circle moving right", "--sampling_option.seed", 7)
    printed = run_script(root, "diffusion/inference.py", root / INFERENCE / "perflow_tiny.py", *common, *arguments, cwd=cwd)
    (video,) = mp4_files(cwd / "samples" / "video_64px")
    return decode_video(video), printed


@pytest.fixture(scope="module")
def trained(tree: Path, small_clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two epochs of four steps: (outputs folder, what was printed)."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder / "outputs", train(tree, "perflow_tiny", small_clips, folder, epochs=2)


def test_a_tiny_student_is_trained_and_sampled_in_four_steps(tree: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    outputs, printed = trained
    assert [folder.name for folder in checkpoints(outputs)] == [f"epoch{step > 4:d}-global_step{step}" for step in (2, 4, 6, 8)]
    assert np.isfinite(losses(printed)).all()
    video, said = sample(tree, tmp_path, "--ckpt_path", checkpoints(outputs)[-1])
    assert video.shape == (9, 64, 64, 3)
    assert "PeRFlow samples with 4 windows and guidance mode fixed" in said


def test_the_last_checkpoint_of_an_epoch_is_resumed_with_the_next_epoch(
    tree: Path, small_clips: Clips, trained: tuple[Path, str], tmp_path: Path
) -> None:
    """Open-Sora 2.0 looks for a step after an epoch's last one (train.py:327), and ends by StopIteration."""
    last = next(folder for folder in checkpoints(trained[0]) if folder.name == "epoch0-global_step4")
    with pytest.raises(AssertionError, match="StopIteration"):
        train(tree, "perflow_tiny", small_clips, tmp_path, "--load", last, epochs=2)
    printed = train(
        tree, "perflow_tiny", small_clips, tmp_path, "--load", last, "--start_step", 0, "--start_epoch", 1, epochs=2
    )
    assert "goes on after 4 training steps" in printed
    found = checkpoints(tmp_path / "outputs")
    assert [folder.name for folder in found] == ["epoch1-global_step6", "epoch1-global_step8"]
    state, whole = (json.loads((folder / "perflow.json").read_text()) for folder in (found[-1], checkpoints(trained[0])[-1]))
    assert state == whole and state["steps"] == 8
    # The same texts, sizes, draws and float32 weights as the unbroken run; the bar shows three digits.
    first, unbroken = (float(re.findall(r"Epoch 1: [^\n]*?loss=([\d.e-]+)", text)[0]) for text in (printed, trained[1]))
    assert first == unbroken


def test_a_tiny_lora_student_is_sampled_with_its_own_windows(tree: Path, small_clips: Clips, tmp_path: Path) -> None:
    train(tree, "perflow_tiny_lora", small_clips, tmp_path)
    (folder,) = (tmp_path / "outputs" / "perflow_tiny_lora").glob("epoch0-global_step4")
    video, said = sample(tree, tmp_path, "--pretrained_lora_path", folder / "lora")
    assert video.shape == (9, 64, 64, 3)
    assert f"is from {folder / 'perflow.json'}" in said


def test_a_tiny_i2v_student_is_sampled_from_an_image(tree: Path, small_clips: Clips, tmp_path: Path) -> None:
    train(tree, "perflow_tiny_i2v", small_clips, tmp_path)
    image = tree / "assets/texts/i2v.png"
    last = checkpoints(tmp_path / "outputs")[-1]
    video, _ = sample(tree, tmp_path, "--ckpt_path", last, "--cond_type", "i2v_head", "--ref", image)
    assert video.shape == (9, 64, 64, 3)


def test_given_frames_need_our_name_of_the_hosts_vae(tree: Path, small_clips: Clips, tmp_path: Path) -> None:
    """Open-Sora's own has no attribute `cfg` (utils/train.py:202)."""
    for kind in ("hunyuan_vae", "perflow_hunyuan_vae"):
        sizes = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
        vae = {"_delete_": True, "type": kind, "from_pretrained": None, **sizes}
        (tree / TRAIN / f"{kind}.py").write_text(f"_base_ = ['perflow_tiny_i2v.py']\nae = {vae}\n")
    with pytest.raises(AssertionError, match="has no attribute 'cfg'"):
        train(tree, "hunyuan_vae", small_clips, tmp_path)
    assert np.isfinite(losses(train(tree, "perflow_hunyuan_vae", small_clips, tmp_path))).all()


def test_t2i2v_draws_its_image_in_50_steps_and_the_video_in_4(tree: Path, trained: tuple[Path, str], tmp_path: Path) -> None:
    """Open-Sora takes num_steps for both. A student has one row a step, where the host asks for three."""
    config = tree / INFERENCE / "perflow_tiny_t2i2v.py"
    flux = {**TINY_FLUX, "guidance_embed": True, "cond_embed": False}
    image = {"type": "autoencoder_2d", "from_pretrained": None, "ch": 32, "num_res_blocks": 1}
    config.write_text(
        f"_base_ = ['perflow_tiny.py']\nuse_t2i2v = True\nimg_resolution = '256px'\nimg_flux = {flux}\nimg_flux_ae = {image}\n"
    )
    script = [
        tree / "scripts/diffusion/inference.py",
        config,
        "--ckpt_path",
        checkpoints(trained[0])[-1],
        "--prompt",
        "a circle",
    ]
    command = [Path(__file__).with_name("_counting_run.py"), *script]
    printed = run_python([str(part) for part in command], nproc=1, log=tmp_path / "t2i2v.log", cwd=tmp_path)
    assert "rows: 4 of the video model, 50 of the image model" in printed
    (video,) = mp4_files(tmp_path / "samples" / "video_64px")
    assert decode_video(video).shape == (9, 64, 64, 3)


@pytest.mark.parametrize("fragment", ["tp", "sp", "t2i2v"])
def test_inference_is_a_base_beside_the_hosts_fragments(tree: Path, fragment: str) -> None:
    child = tree / INFERENCE / f"child_{fragment}.py"
    child.write_text(f'_base_ = ["perflow_256px.py", "plugins/{fragment}.py"]\n')
    config, plugin = (Config.fromfile(tree / INFERENCE / name) for name in (child.name, f"plugins/{fragment}.py"))
    assert {name: config[name] for name in plugin} == dict(plugin)
    assert config.model.type == "perflow_flux" and config.sampling_option.num_steps == 4


@pytest.mark.parametrize("size", ["256px", "768px", "t2i2v_256px", "t2i2v_768px"])
def test_inference_differs_from_the_hosts_own_in_the_student_alone(tree: Path, size: str) -> None:
    ours, host = (Config.fromfile(tree / INFERENCE / f"{start}{size}.py").to_dict() for start in ("perflow_", ""))
    assert ours.pop("custom_imports") and ours["model"].pop("perflow") == {"t2i_steps": host["sampling_option"]["num_steps"]}
    assert ours["model"].pop("type") == "perflow_flux" and host["model"].pop("type") == "flux"
    assert ours["sampling_option"].pop("num_steps") == 4 and host["sampling_option"].pop("num_steps") == 50
    for name in ("plugin", "plugin_config", "plugin_ae", "plugin_config_ae"):  # its 768px always has those of sp.py
        host.pop(name, None)
    assert ours == host


@pytest.mark.parametrize("size, stage", [("256px", "stage1_i2v"), ("768px", "stage2_i2v")])
def test_training_has_the_network_and_the_plugin_of_the_hosts_stage(tree: Path, size: str, stage: str) -> None:
    ours, host = (Config.fromfile(tree / TRAIN / f"{name}.py").to_dict() for name in (f"perflow_{size}_i2v", stage))
    ours["dataset"].pop("memory_efficient"), host["dataset"].pop("memory_efficient", None)
    for name in ("plugin", "plugin_config", "condition_config", "grad_checkpoint", "is_causal_vae", "dataset", "grad_clip"):
        assert ours[name] == host[name], name
    for model in (ours["model"], host["model"]):
        for name in ("type", "from_pretrained"):
            model.pop(name)
    assert ours["model"].pop("perflow") and ours["model"] == host["model"]
