"""`opensora-perflow plan` and `curve` through Open-Sora's real scripts/inference.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _harness import REPOSITORY, run_python

from opensora_perflow.training.plan_file import windows_of
from opensora_perflow.worlds.model import WEIGHTS, TinySTDiT

pytestmark = pytest.mark.host
SIZES = {key: TinySTDiT().config[key] for key in ("hidden_size", "depth", "num_heads")}
RFLOW = dict(_delete_=True, type="rflow", use_timestep_transform=True, num_sampling_steps=30, cfg_scale=3.0)


def inference_config(path: Path, **changes: object) -> Path:
    """A child of the repository's tiny inference config, with the demo's clip size."""
    settings = dict(num_frames=17, image_size=(192, 192), fps=8, batch_size=2, multi_resolution="STDiT2", aes=None, **changes)
    base = str(REPOSITORY / "configs" / "opensora" / "perflow_tiny_inference.py")
    path.write_text("\n".join([f"_base_ = {base!r}", *(f"{key} = {value!r}" for key, value in settings.items())]) + "\n")
    path.with_suffix(".txt").write_text("a red circle moving right\na blue square moving left\n")
    return path


def start(host_root: Path, command: str, *options: str, config: Path) -> str:
    script = str(host_root / "scripts" / "inference.py")
    host = [str(config), "--prompt-path", str(config.with_suffix(".txt"))]
    arguments = ["-m", "opensora_perflow", command, "--script", script, *options, "--", *host]
    return run_python(arguments, nproc=1, log=config.with_suffix(".log"), cwd=config.parent)


def test_a_better_grid_for_a_checkpoint(host_root: Path, host_tag: str, tmp_path: Path) -> None:
    if host_tag != "1.2":
        pytest.skip("the demo's weights fit the STDiT3 of Open-Sora 1.2")
    config = inference_config(tmp_path / "sample.py", model=dict(from_pretrained=str(WEIGHTS), **SIZES), scheduler=RFLOW)
    options = ["--steps", "3", "--candidates", "12", "--samples", "2", "--out", "plan.json"]
    printed = start(host_root, "plan", *options, config=config)
    # 3 steps of a strongly guided teacher are far from its path, and uniform ones are not the best.
    (grid,) = windows_of(str(tmp_path / "plan.json")).grids
    assert len(grid) == 4 and "Endpoint errors" in printed
    assert not list(tmp_path.rglob("*.mp4"))  # stopped before anything was sampled


def test_the_curve_of_a_checkpoint(host_root: Path, host_tag: str, tmp_path: Path) -> None:
    if host_tag in ("1.0", "1.1"):
        pytest.skip("no rectified flow before Open-Sora 1.2")
    config = inference_config(tmp_path / "sample.py")
    start(host_root, "curve", "--samples", "2", "--max-steps", "2", "--out", "curve", config=config)
    rows = json.loads((tmp_path / "curve" / "curve.json").read_text())["rows"]
    assert [(row["steps"], row["nfe"]) for row in rows] == [(1, 2), (2, 4)]
