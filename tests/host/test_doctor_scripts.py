"""`opensora-perflow doctor` runs each Open-Sora's own train.py: what is sound passes, and what is broken is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _harness import REPOSITORY, Clips, train_config
from _harness_v2 import train_config_v2

pytestmark = pytest.mark.host

SOUND = ("dropout in the teacher", "window lookup", "precision of t", "CFG parity", "step-0 parity", "targets", "train.py")
"""Of a network of random weights; that it knows nothing of the data is another row."""


def doctor(root: Path, config: Path, cwd: Path, *arguments: str) -> dict[str, dict[str, str]]:
    """Rows by name."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "opensora_perflow",
        "doctor",
        str(config),
        "--open-sora",
        str(root),
        "--json",
        "--",
        *arguments,
    ]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return {row["name"]: row for row in json.loads(done.stdout)["checks"]}


def test_the_doctor_runs_the_first_steps_of_train_py(host_root: Path, host_tag: str, clips: Clips, tmp_path: Path) -> None:
    config = train_config(tmp_path / "config.py", host_tag, clips, {"type": "perflow"}, tmp_path / "outputs")
    rows = doctor(host_root, config, tmp_path)
    # A diffusion's network of random weights says nothing, and lines to nowhere follow.
    sound = [name for name in SOUND if host_tag not in ("1.0", "1.1") or name not in ("CFG parity", "targets")]
    assert {name: rows[name]["status"] for name in sound} == dict.fromkeys(sound, "passed"), rows
    assert rows["trained weights"]["status"] == "passed" and rows["EMA"]["status"] == "passed", rows
    assert "at the peak of a step" in rows["estimate"]["measured"], rows["estimate"]
    assert not (tmp_path / "outputs").exists()


def test_a_learning_rate_of_zero_is_named(host_root: Path, host_tag: str, clips: Clips, tmp_path: Path) -> None:
    config = train_config(tmp_path / "config.py", host_tag, clips, {"type": "perflow"}, tmp_path / "outputs", lr=0.0)
    row = doctor(host_root, config, tmp_path)["trained weights"]
    assert row["status"] == "failed" and "learning rate 0.0" in row["measured"]


def test_the_doctor_runs_the_first_steps_of_2_0(host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    model = {"type": "perflow_flux", "perflow": {"guidance": {"mode": "fixed", "scale": 3.0}}}
    imports = {"imports": ["opensora_perflow", "opensora_perflow.hosts.v2.tiny"], "allow_failed_imports": False}
    config = train_config_v2(tmp_path / "config.py", small_clips, tmp_path / "outputs", model=model, custom_imports=imports)
    rows = doctor(host2_root, config, tmp_path)
    assert {name: rows[name]["status"] for name in SOUND} == dict.fromkeys(SOUND, "passed"), rows
    assert rows["trained weights"]["status"] == "passed", rows
    assert "at the peak of a step" in rows["estimate"]["measured"], rows["estimate"]
