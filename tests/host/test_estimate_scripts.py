"""The estimator on Open-Sora's own classes: against what a step of the same network takes, and for each version's configs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from _harness import REPOSITORY, run_python

pytestmark = pytest.mark.host
CONFIGS = REPOSITORY / "configs" / "opensora"
OWN = {  # of the checkout, and what of the network is known from it: parameters in millions
    "1.0": ("configs/opensora/train/16x256x256.py", "759.6"),
    "1.1": ("configs/opensora-v1-1/train/stage1.py", "767.5"),
}
OURS = {"1.2": "perflow_lora.py", "1.3": "perflow_stage1_v1_3.py"}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_estimate_is_what_a_step_takes(host_root: Path, host_tag: str, kind: str, tmp_path: Path) -> None:
    """Residents to the byte. Attention on a CPU keeps a copy of its output that the kernels which are counted do not."""
    if host_tag not in OURS:
        pytest.skip("STDiT3 is measured")
    pytest.importorskip("peft")
    worker = str(Path(__file__).with_name("_estimate_worker.py"))
    printed = run_python([worker, str(host_root), kind], nproc=1, log=tmp_path / "log", cwd=tmp_path)
    found = json.loads(re.search(r"^RESULT (.*)$", printed, re.M)[1])
    counted, resident = found["counted"], found["resident"]
    for ours, theirs in {"weights": "student", "teacher": "teacher", "EMA": "EMA"}.items():
        assert counted[ours] == resident[theirs]
    assert counted["gradients"] == resident["gradients"] + found["idle"]
    assert counted["optimizer"] == resident["Adam"] - found["steps"] + 2 * found["idle"]
    for name, accepted in {"kept": 0.1, "checkpointed": 0.01}.items():
        assert found["estimated"][name] == pytest.approx(found["measured"][name], rel=accepted)


def estimate(root: Path, config: Path, folder: Path, *options: str) -> str:
    arguments = ["-m", "opensora_perflow", "estimate", str(config), "--open-sora", str(root), *options]
    return run_python(arguments, nproc=1, log=folder / "log", cwd=folder)


def test_a_config_of_each_version(host_root: Path, host_tag: str, tmp_path: Path) -> None:
    if host_tag in OWN:
        path, million = OWN[host_tag]
        printed = estimate(host_root, host_root / path, tmp_path)
        assert f"{million} M parameters, {million} M trained" in printed
        assert "teacher              0 GiB" in printed and "teacher 0, 1 with a gradient" in printed
    else:
        printed = estimate(host_root, CONFIGS / OURS[host_tag], tmp_path, "--memory", "1000")
        assert re.search(r"360p x 113 .* 15.6$" if host_tag == "1.3" else r"144p x 51 .* 0.264$", printed, re.M)


def test_the_mmdit_of_2_0(host2_root: Path, tmp_path: Path) -> None:
    """11.9 B parameters on a laptop: in bfloat16 22.2 GiB, with adapters .4 more."""
    printed = estimate(host2_root, CONFIGS / "v2" / "train" / "perflow_256px_lora.py", tmp_path, "--gpus", "8")
    assert "12,145.4 M parameters, 254.0 M trained, on 8 GPU" in printed
    assert float(re.search(r"weights +([\d.]+) GiB", printed)[1]) == pytest.approx(12.1454e9 * 2 / 2**30, rel=1e-3)
    assert re.search(r"256px x 129 +1 .* 4.19$", printed, re.M)
