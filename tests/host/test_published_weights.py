"""Weights as they are published, and as an older version has them, through Open-Sora's real train.py and its own networks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from _harness import NETWORKS, OWN_SCHEDULER, Clips, checkpoints, run_script, train_config

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.hosts.v1.weights import TABLES, ZERO_AT_FIRST

pytestmark = pytest.mark.host
LACKING = {"1.0": TABLES, "1.3": ZERO_AT_FIRST}
"""Weights of 1.0 are published without tables, those of 1.2 have no embedders of reference frames."""


def test_a_run_from_published_weights_is_resumed_with_them_as_teacher(
    host_root: Path, host_tag: str, clips: Clips, tmp_path: Path
) -> None:
    if host_tag not in LACKING:
        pytest.skip(f"weights of Open-Sora {host_tag} have all keys of its network")

    def train(name: str, scheduler: dict[str, Any], pretrained: Path | None, *options: object) -> tuple[Path, str]:
        (tmp_path / name).mkdir()
        flags = {} if host_tag == "1.0" else {"qk_norm": True, "enable_flash_attn": False, "enable_layernorm_kernel": False}
        model = {"type": NETWORKS[host_tag], "from_pretrained": None if pretrained is None else str(pretrained), **flags}
        outputs = tmp_path / name / "outputs"
        config = train_config(
            tmp_path / name / "config.py", host_tag, clips, scheduler, outputs, epochs=2, ckpt_every=2, model=model
        )
        printed = run_script(host_root, "train.py", config, *options, cwd=tmp_path / name)
        return checkpoints(outputs)[0], printed

    base, _ = train("base", OWN_SCHEDULER[host_tag], None)
    state, published = read_state_dict(base), tmp_path / "published.pth"
    assert set(LACKING[host_tag]) <= state.keys()
    torch.save({key: value for key, value in state.items() if key not in LACKING[host_tag]}, published)
    first, printed = train("first", {"type": "perflow", "watch": None}, published)
    teacher = {"from_pretrained": str(published)}
    _, again = train("resumed", {"type": "perflow", "watch": None, "teacher": teacher}, published, "--load", first)
    assert "PeRFlow goes on after 2 training steps" in again
    (one,), (other,) = (re.findall(r"PeRFlow teacher: .*\(fingerprint ([0-9a-f]{16})\)", text) for text in (printed, again))
    assert one == other  # the file is the copy of the student that the first run made, tables and all
