"""PeRFlow under every script of Open-Sora that calls a scheduler beside train.py and inference.py."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _harness import (
    NETWORKS,
    OWN_SCHEDULER,
    Clips,
    checkpoints,
    decode_video,
    inference_config,
    mp4_files,
    run_python,
    run_script,
    train_config,
    write_config,
)

pytestmark = pytest.mark.host
EPSILON = ("1.0", "1.1")
"""Tags whose own networks are an iddpm's."""


def training_scheduler(tag: str) -> dict[str, Any]:
    """OWN_SCHEDULER of a tag as perflow, with a fast teacher."""
    keys = {"timestep_respacing": ""} if tag in EPSILON else {"use_timestep_transform": True}
    return {"type": "perflow", "teacher": {"steps_per_window": 2}, **keys}


def sampling_scheduler(tag: str) -> dict[str, Any]:
    """One step a window, guided."""
    keys = {} if tag in EPSILON else {"use_timestep_transform": True}
    return {"type": "perflow", "num_sampling_steps": 4, "cfg_scale": 7.0, **keys}


@pytest.fixture(scope="module")
def student(host_root: Path, host_tag: str, clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a perflow student after two steps."""
    folder = tmp_path_factory.mktemp(f"student{host_tag}")
    two = Clips(folder / "clips.csv", clips.videos[:2], clips.captions[:2])
    two.csv.write_text("\n".join(clips.csv.read_text().splitlines()[:3]) + "\n")
    config = train_config(folder / "train.py", host_tag, two, training_scheduler(host_tag), folder / "outputs")
    run_script(host_root, "train.py", config, cwd=folder)
    (checkpoint,) = checkpoints(folder / "outputs")
    return checkpoint


@pytest.fixture(scope="module")
def picture(clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first frame of a clip."""
    from PIL import Image

    path = tmp_path_factory.mktemp("picture") / "reference.png"
    Image.fromarray(decode_video(clips.videos[0])[0]).save(path)
    return path


# Sampling


def sample(
    root: Path, tag: str, script: str, student: Path, folder: Path, *options: object, **settings: Any
) -> tuple[np.ndarray, str]:
    config = inference_config(folder / "sample.py", tag, sampling_scheduler(tag), student, folder / "samples", **settings)
    printed = run_script(root, script, config, *options, cwd=folder)
    (video,) = mp4_files(folder / "samples")
    return decode_video(video), printed


def test_inference_long_with_a_reference_and_a_loop(
    host_root: Path, host_tag: str, student: Path, picture: Path, tmp_path: Path
) -> None:
    if host_tag != "1.1":
        pytest.skip("inference-long.py is Open-Sora 1.1's; 1.2 and 1.3 have the loop in inference.py")
    settings = {"loop": 2, "condition_frame_length": 5, "num_frames": 34}
    settings |= {"reference_path": [str(picture)], "mask_strategy": ["0,0,0,0,1,0.25"]}  # noised from the last window on
    video, printed = sample(host_root, host_tag, "inference-long.py", student, tmp_path, **settings)
    assert video.shape == (34 + 34 - 5, 64, 64, 3)
    assert printed.count("0/4 [") == 2


@pytest.mark.parametrize(
    "cond_type, loop", [("i2v_head", 1), ("i2v_tail", 1), ("i2v_loop", 1), ("v2v_head", 1), ("i2v_loop", 2)]
)
def test_inference_i2v(
    host_root: Path, host_tag: str, student: Path, clips: Clips, picture: Path, cond_type: str, loop: int, tmp_path: Path
) -> None:
    if host_tag != "1.3":
        pytest.skip("inference_i2v.py is new in Open-Sora 1.3")
    references = {"v2v_head": clips.videos[0], "i2v_loop": f"{picture};{picture}"}
    options = ["--cond-type", cond_type, "--reference-path", references.get(cond_type, picture), "--loop", str(loop)]
    options += ["--condition-frame-length", "2"]
    video, printed = sample(host_root, host_tag, "inference_i2v.py", student, tmp_path, *options, dtype="bf16")
    # 17 frames are 5 latent ones; two loops that share 2 have 8, of which the script keeps a multiple of five.
    assert video.shape == (17, 64, 64, 3)
    assert printed.count("0/4 [") == loop


@pytest.fixture(scope="module")
def gradio_calls(
    host_root: Path, host_tag: str, student: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What gradio/app.py asked of the scheduler in four clicks of its buttons, see _gradio_worker.py."""
    if host_tag == "1.0":
        pytest.skip("Open-Sora 1.0 has no gradio app")
    folder = tmp_path_factory.mktemp(f"gradio{host_tag}")
    path = {
        "1.1": "configs/opensora-v1-1/inference/sample-ref.py",
        "1.2": "configs/opensora-v1-2/inference/sample.py",
        "1.3": "configs/opensora-v1-3/inference/t2v.py",
    }[host_tag]
    settings = {"dtype": "bf16", "condition_frame_length": 5, "text_encoder": {"type": "perflow_tiny_text_t5"}}
    config = inference_config(folder / path, host_tag, sampling_scheduler(host_tag), student, folder / "unused", **settings)
    if host_tag == "1.3":
        with_images = write_config(config.with_name("v2v.py"), {"cond_type": "i2v_head", "image_cfg_scale": 3.0})
        with_images.write_text(config.read_text() + with_images.read_text())
    weights = shutil.copytree(student / "model", folder / "weights")
    worker = Path(__file__).with_name("_gradio_worker.py")
    run_python([str(worker), str(host_root), str(weights), "calls.json"], nproc=1, log=folder / "gradio.log", cwd=folder)
    calls = json.loads((folder / "calls.json").read_text())
    for call in calls:
        call["file"] = folder / call["file"]
    return calls


def test_gradio_initialises_the_live_scheduler_again(gradio_calls: list[dict[str, Any]], host_tag: str) -> None:
    first, second, reference, image = gradio_calls
    assert all(call["inference_mode"] and call["finite"] for call in gradio_calls)
    assert [(call["steps"], call["cfg_scale"]) for call in gradio_calls] == [(4, 7.0), (6, 1.0), (4, 7.0), (4, 7.0)]
    # A doubled batch a step where guided, three branches with a reference frame of v1.3, one where the scale is 1.
    branches = 3 if host_tag == "1.3" else 2
    assert [call["batches"] for call in gradio_calls] == [[2] * 4, [1] * 6, [branches] * 4, [2] * 4]
    assert host_tag == "1.3" or len({call["scheduler"] for call in gradio_calls}) == 1  # 1.3 builds one for each click
    assert reference["mask_index"] == ([0] if host_tag == "1.3" else None)


def test_gradio_writes_videos(gradio_calls: list[dict[str, Any]], host_tag: str) -> None:
    # 1.1 takes 2 s x 8 frames, which the tiny VAE makes 4 latent frames; decoded without a length, they give 13.
    num_frames = 13 if host_tag == "1.1" else 17
    for call in gradio_calls[:3]:
        assert call["file"].suffix == ".mp4" and decode_video(call["file"]).shape == (num_frames, 192, 192, 3)
    # 1.3 asks the VAE for 1 * 17 // 5 frames of a still image, and the tiny VAE gives them.
    image = gradio_calls[3]["file"]
    assert image.suffix == (".mp4" if host_tag == "1.3" else ".png") and image.is_file()


def test_training_after_sampling_in_inference_mode(host_root: Path, host_tag: str, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("_inference_mode_worker.py")
    printed = run_python([str(worker), str(host_root), host_tag], nproc=1, log=tmp_path / "worker.log", cwd=tmp_path)
    assert re.search(r"trained \d+ parameters", printed)


# Training from features


def test_training_from_extracted_features(host_root: Path, host_tag: str, clips: Clips, tmp_path: Path) -> None:
    if host_tag != "1.2":
        pytest.skip("BatchFeatureDataset is new in Open-Sora 1.2, and 1.3's train.py cannot read it (scripts/train.py:297)")
    # Text goes in projected and packed, so that there is no null text to drop prompts to.
    model = {"type": NETWORKS[host_tag], "skip_y_embedder": True, "freeze_y_embedder": True}
    model |= {"qk_norm": True, "enable_flash_attn": False, "enable_layernorm_kernel": False}
    features = tmp_path / "features"
    settings = {"save_dir": str(features), "bin_size": 2, "save_text_features": True, "save_compressed_text_features": True}
    settings |= {"model": model, "bucket_config": {"144p": {17: (1.0, 2)}}}
    scheduler = training_scheduler(host_tag)
    extract = train_config(tmp_path / "extract.py", host_tag, clips, scheduler, tmp_path / "unused", **settings)
    run_script(host_root, "misc/extract_feat.py", extract, cwd=tmp_path)
    settings = {"model": model, "dataset": {"type": "BatchFeatureDataset", "data_path": str(features)}, "vae": None}
    settings |= {"text_encoder": None, "load_video_features": True, "load_text_features": True, "vae_out_channels": 4}
    settings |= {"text_encoder_output_dim": 32, "text_encoder_model_max_length": 10, "bucket_config": None}
    settings |= {"mask_ratios": {"random": 0.5}, "epochs": 4}
    config = train_config(tmp_path / "train.py", host_tag, clips, scheduler, tmp_path / "outputs", **settings)
    printed = run_script(host_root, "train.py", config, cwd=tmp_path)
    losses = [float(value) for value in re.findall(r"loss=([-+.\deE]+|nan|inf)", printed)]
    assert len(losses) >= 8 and np.isfinite(losses).all()
    assert [folder.name for folder in checkpoints(tmp_path / "outputs")][-1] == "epoch3-global_step8"


# Measuring: each script with the tag's own scheduler, to see that upstream runs here, and with perflow.


def many(clips: Clips, folder: Path, count: int) -> Clips:
    """`count` rows of clips."""
    header, *rows = clips.csv.read_text().splitlines()
    table = folder / "many.csv"
    table.write_text("\n".join([header, *(rows * count)[:count]]) + "\n")
    return Clips(table, clips.videos, clips.captions)


NO_TENSOR = "'list' object has no attribute 'to'"
STOPS = "moves every entry of a batch to the device, and the batches of Open-Sora 1.3 hold a list of paths: it stops upstream"


def skip_what_stops_upstream(tag: str, scheduler: str, line: str) -> None:
    """Three scripts of 1.3 stop before they have a loss. With 1.3's own scheduler that is run and seen."""
    if tag == "1.3" and scheduler == "perflow":
        pytest.skip(f"{line} {STOPS}")


@pytest.mark.parametrize("scheduler", ["own", "perflow"])
def test_eval_loss(host_root: Path, host_tag: str, clips: Clips, scheduler: str, tmp_path: Path) -> None:
    if host_tag in EPSILON:
        pytest.skip("eval/loss is new in Open-Sora 1.2")
    skip_what_stops_upstream(host_tag, scheduler, "eval/loss/eval_loss.py:159")
    settings = OWN_SCHEDULER[host_tag] if scheduler == "own" else training_scheduler(host_tag)
    # A worker, as in the shipped config: with none, the host's sampler has no batch left for a second timestep.
    changes = {"num_eval_timesteps": 2, "num_workers": 1, "bucket_config": {"144p": {17: (None, 2)}}}
    config = train_config(tmp_path / "eval.py", host_tag, clips, settings, tmp_path / "unused", **changes)
    script = str(host_root / "eval" / "loss" / "eval_loss.py")

    def run() -> str:
        return run_script(host_root, script, config, cwd=tmp_path)

    if host_tag == "1.3":
        with pytest.raises(AssertionError, match=NO_TENSOR):
            run()
        return
    found = re.findall(r"timestep: ([\d.]+), loss: ([-\d.einf]+)", run())
    assert [float(t) for t, _ in found] == [333.33, 666.67]
    assert all(np.isfinite(float(loss)) and float(loss) >= 0 for _, loss in found)


@pytest.mark.parametrize("scheduler", ["own", "perflow"])
def test_search_bs(host_root: Path, host_tag: str, clips: Clips, scheduler: str, tmp_path: Path) -> None:
    if host_tag == "1.0":
        pytest.skip("scripts/misc is new in Open-Sora 1.1")
    skip_what_stops_upstream(host_tag, scheduler, "scripts/misc/search_bs.py:210")
    settings = OWN_SCHEDULER[host_tag] if scheduler == "own" else training_scheduler(host_tag)
    script = "misc/search_bs.py"
    if host_tag == "1.1":  # one step to warm up, one to measure
        config = train_config(tmp_path / "bs.py", host_tag, clips, settings, tmp_path / "unused")
        options = ["--data-path", clips.csv, "--base-resolution", "144p", "--base-frames", "17"]
        options += ["--batch-size-start", "1", "--batch-size-end", "2", "--batch-size-step", "1"]
        printed = run_script(host_root, script, config, *options, cwd=tmp_path)
        assert "Base resolution: 144p, Base frames: 17, Batch size: 1" in printed
        return
    # Five steps each, written into the script; (guessed batch size, variance).
    changes = {"base": ("144p", 17), "bucket_config": {"144p": {17: (1, 0)}}}
    config = train_config(tmp_path / "bs.py", host_tag, many(clips, tmp_path, 10), settings, tmp_path / "unused", **changes)
    printed = run_script(host_root, script, config, cwd=tmp_path)
    if host_tag == "1.3":
        assert NO_TENSOR in printed and "144p, 17, 0, 0.00" in printed  # the script prints errors and goes on
        return
    assert "Traceback" not in printed
    assert re.search(r"144p, 17, 1, \d+\.\d\d", printed)  # resolution, frames, batch size, seconds a step


@pytest.mark.parametrize("scheduler", ["own", "perflow"])
def test_profile_train(host_root: Path, host_tag: str, clips: Clips, scheduler: str, tmp_path: Path) -> None:
    if host_tag in EPSILON:
        pytest.skip("scripts/misc/profile_train.py is new in Open-Sora 1.2")
    skip_what_stops_upstream(host_tag, scheduler, "scripts/misc/profile_train.py:244")
    settings = OWN_SCHEDULER[host_tag] if scheduler == "own" else training_scheduler(host_tag)
    config = train_config(tmp_path / "profiled.py", host_tag, clips, settings, tmp_path / "outputs")

    def run() -> str:
        return run_script(host_root, "misc/profile_train.py", config, cwd=tmp_path)

    if host_tag == "1.3":
        with pytest.raises(AssertionError, match=NO_TENSOR):
            run()
        return
    losses = [float(value) for value in re.findall(r"loss=([-+.\deE]+|nan|inf)", run())]
    assert len(losses) >= 4 and np.isfinite(losses).all()
    assert [folder.name for folder in checkpoints(tmp_path / "outputs")] == ["epoch0-global_step2", "epoch0-global_step4"]
