"""Open-Sora 2.0 with its tensor and sequence parallelism: a group of two processes does what one process does.

In float32, so that the order of sums is all that differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _harness import Clips, checkpoints, decode_video, losses, mp4_files, run_python, run_script
from _harness_v2 import inference_config_v2, train_config_v2

pytestmark = pytest.mark.host

WORKER = str(Path(__file__).with_name("_gloo_run.py"))
ONE = {"tp_size": 1, "pp_size": 1, "sp_size": 1, "zero_stage": 0, "static_graph": True}
SEQUENCE = {**ONE, "sp_size": 2, "enable_sequence_parallelism": True, "sequence_parallelism_mode": "all_to_all"}
GROUPS = {"tensor": {**ONE, "tp_size": 2}, "sequence": SEQUENCE}
MODEL: dict[str, Any] = {"type": "perflow_flux"}
IMPORTS = {"imports": ["opensora_perflow", "opensora_perflow.hosts.v2.tiny"], "allow_failed_imports": False}


def train(root: Path, clips: Clips, folder: Path, plugin: dict[str, Any], nproc: int) -> str:
    model = {**MODEL, "perflow": {"guidance": {"mode": "fixed", "scale": 3.0}}}
    config = train_config_v2(
        folder / "train.py", clips, folder / "outputs", model=model, custom_imports=IMPORTS, dtype="fp32",
        plugin="hybrid", plugin_config={**plugin, "reduce_bucket_size_in_m": 1},
    )  # fmt: skip
    command = [WORKER, str(root / "scripts/diffusion/train.py"), str(config)]
    return run_python(command, nproc=nproc, log=folder / "train.log", cwd=folder)


@pytest.fixture(scope="module")
def trained(host2_root: Path, small_clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """In one process: (folder, what was printed)."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(host2_root, small_clips, folder, ONE, 1)


def test_a_sequence_parallel_group_trains_as_one_process(
    host2_root: Path, small_clips: Clips, trained: tuple[Path, str], tmp_path: Path
) -> None:
    """The first loss, and that the run learns. Later ones differ by some percent, in Open-Sora's own training with `flux` too:
    its gradients of a split sequence are others."""
    found, alone = losses(train(host2_root, small_clips, tmp_path, SEQUENCE, 2)), losses(trained[1])
    assert found[0] == alone[0] and len(found) == len(alone) >= 4
    np.testing.assert_allclose(found, alone, rtol=0.2)  # .08 were seen; a gradient that is lost or doubled is not told apart


@pytest.mark.parametrize("kind", GROUPS)
def test_a_group_samples_as_one_process(host2_root: Path, trained: tuple[Path, str], tmp_path: Path, kind: str) -> None:
    checkpoint, videos = checkpoints(trained[0] / "outputs")[-1], []
    for name, options in {"alone": {}, kind: {"plugin": "hybrid", "plugin_config": GROUPS[kind]}}.items():
        config = inference_config_v2(
            tmp_path / f"{name}.py", checkpoint, tmp_path / name, model=MODEL, custom_imports=IMPORTS, dtype="fp32", **options
        )
        if options:
            command = [WORKER, str(host2_root / "scripts/diffusion/inference.py"), str(config)]
            printed = run_python(command, nproc=2, log=tmp_path / f"{name}.log", cwd=tmp_path)
            assert "with size 2" in printed
        else:
            run_script(host2_root, "diffusion/inference.py", config, cwd=tmp_path)
        (path,) = mp4_files(tmp_path / name / "video_64px")
        videos.append(decode_video(path).astype(int))
    assert videos[0].std() > 5
    assert np.abs(videos[0] - videos[1]).max() <= 1  # of 255: rounding, before the codec
