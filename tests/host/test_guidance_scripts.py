"""Mode range and negative prompts through the real train.py and inference.py: STDiT (1.0), STDiT2 (1.1), STDiT3 (1.2, 1.3)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from _harness import (
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
from opensora_perflow.hosts.scale_input import direction
from opensora_perflow.hosts.v1.negative_text import read_negative

pytestmark = pytest.mark.host
RANGE = {"mode": "range", "scale": [1.0, 9.0]}


@pytest.fixture(scope="module")
def trained(host_root: Path, host_tag: str, clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student for a range of scales, away from a negative prompt: outputs folder of four steps."""
    folder = tmp_path_factory.mktemp(f"range{host_tag}")
    negative = folder / "negative.safetensors"
    scheduler = {"type": "perflow", "teacher": {"steps_per_window": 2}, "guidance": {**RANGE, "negative": str(negative)}}
    masks = {"mask_ratios": {"image_head": 0.5}} if host_tag in ("1.2", "1.3") else {}
    settings = {"grad_checkpoint": host_tag in ("1.2", "1.3"), **masks}
    config = train_config(folder / "train.py", host_tag, clips, scheduler, folder / "outputs", **settings)
    command = ["-m", "opensora_perflow", "embed", str(config), "blurry", "--out", str(negative), "--open-sora", str(host_root)]
    run_python(command, nproc=1, log=folder / "embed.log", cwd=folder)
    assert read_negative(negative)["y"].shape == (1, 10, 32)
    printed = run_script(host_root, "train.py", config, cwd=folder)
    losses = [float(value) for value in re.findall(r"loss=([-+.\deE]+|nan|inf)", printed)]
    assert len(losses) >= 4 and np.isfinite(losses).all()
    return folder / "outputs"


def test_the_checkpoint_has_what_it_had_and_the_scale_was_learnt(trained: Path) -> None:
    first, last = (read_state_dict(checkpoints(trained)[i]) for i in (0, -1))
    # Nothing of ours: the host's own scale_shift_table (STDiT2 has a scale_shift_table_temporal too) are the only scales.
    assert first.keys() == last.keys() and all("scale_shift_table" in name for name in last if "scale" in name)
    change = (last["t_embedder.mlp.0.weight"] - first["t_embedder.mlp.0.weight"]).float()
    assert (change @ direction(change.shape[1]).float()).abs().max() > 0  # no timestep moves the weights that way


def test_one_student_is_sampled_at_several_scales(host_root: Path, host_tag: str, trained: Path, tmp_path: Path) -> None:
    # v1.0 writes model_ckpt.pt into the checkpoint that it loads: it is given a copy.
    checkpoint = shutil.copytree(checkpoints(trained)[-1], tmp_path / "checkpoint")

    def sample(scale: float) -> torch.Tensor:
        scheduler = {"type": "perflow", "guidance": RANGE, "cfg_scale": scale}
        config = inference_config(tmp_path / f"{scale:g}.py", host_tag, scheduler, checkpoint, tmp_path / f"samples{scale:g}")
        run_script(host_root, "inference.py", config, cwd=tmp_path)
        (video,) = mp4_files(tmp_path / f"samples{scale:g}")
        return torch.from_numpy(decode_video(video)).float()

    assert sample(9.0).shape == (17, 64, 64, 3)
    with pytest.raises(AssertionError, match="takes guidance scales from 1 to 9, for which it was trained"):
        sample(12.0)
