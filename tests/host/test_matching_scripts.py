"""Distribution matching in Open-Sora's real train.py: ZeRO-2 in two processes, saved and resumed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from _harness import REPOSITORY, Clips, checkpoints, losses, run_script, write_clips

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.training.adapters import is_added
from opensora_perflow.training.fake_score import FILE_NAME

pytestmark = pytest.mark.host
CONFIG = REPOSITORY / "configs" / "opensora" / "perflow_tiny_stage1.py"
IMPORTS = dict(imports=["opensora_perflow", "opensora_perflow.hosts.tiny", "_matching_probe"], allow_failed_imports=False)
SCHEDULER = dict(windows=2, draws=dict(shares=[2, 1]), watch=None, matching=dict(weight=0.5, rank=4, updates=2))


@pytest.fixture(scope="module", autouse=True)
def is_a_rectified_flow(host_tag: str) -> None:
    if host_tag in ("1.0", "1.1"):
        pytest.skip("matching is for rectified flows")


def train(
    root: Path, clips: Clips, folder: Path, *options: object, base: Path = CONFIG
) -> tuple[list[Path], list[tuple[str, str]], str]:
    """(checkpoints, (process, its adapters) after each step, what was printed) of one pass over four clips, two a step."""
    folder.mkdir(exist_ok=True)
    config = folder / "config.py"
    lines = [
        f"_base_ = {str(base)!r}",
        f"custom_imports = {IMPORTS}",
        f"scheduler = {SCHEDULER}",
        "epochs = 1",
        "ckpt_every = 1",
    ]
    config.write_text("\n".join(lines) + "\n")
    arguments = ["--data-path", clips.csv, "--outputs", folder / "outputs", *options]
    printed = run_script(root, "train.py", config, *arguments, nproc=2, cwd=folder)
    return checkpoints(folder / "outputs"), re.findall(r"adapters of process (\d): (\S+)", printed), printed


def test_adapters_are_trained_alike_in_both_processes_and_resumed(
    host_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, and one after the checkpoint of the first: the same adapters, to the last bit. Clips of 18 frames leave the
    host's random crop to 17 one choice."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    clips = write_clips(tmp_path / "clips", num_frames=18)
    (first, last), said, printed = train(host_root, clips, tmp_path / "whole")
    assert np.isfinite(losses(printed)).all() and len(said) == 4
    ranks = [[digest for rank, digest in said if rank == name] for name in "01"]
    assert ranks[0] == ranks[1] and ranks[0][0] != ranks[0][1]
    (again,), said, printed = train(host_root, clips, tmp_path / "resumed", "--load", first)
    assert "PeRFlow goes on after 1 training steps" in printed and {digest for _, digest in said} == {ranks[0][1]}
    states = [read_state_dict(folder / FILE_NAME) for folder in (first, last, again)]
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[1])
    assert any("exp_avg_sq" in name for name in states[0])
    assert all((states[0][name] != states[1][name]).any() for name in states[0] if name.endswith("blocks.0.mlp.fc1.up"))


def test_a_student_of_adapters_has_one_network(host_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapters and the score's lie on the same layers, and are saved apart; a run that is resumed goes on with both."""
    pytest.importorskip("peft")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    clips, base = write_clips(tmp_path / "clips", num_frames=18), CONFIG.with_name("perflow_tiny_lora.py")
    found, said, printed = train(host_root, clips, tmp_path / "whole", base=base)
    ranks = [[digest for rank, digest in said if rank == name] for name in "01"]
    assert np.isfinite(losses(printed)).all() and ranks[0] == ranks[1] and ranks[0][0] != ranks[0][1]
    fake, student = read_state_dict(found[-1] / FILE_NAME), read_state_dict(found[-1] / "model")
    assert all(is_added(name) for name in student) and not any(is_added(name) for name in fake)
    _, said, printed = train(host_root, clips, tmp_path / "resumed", "--load", found[0], base=base)
    assert "PeRFlow goes on after 1 training steps" in printed and "new adapters" not in printed
    assert said[0][1] == said[1][1]
