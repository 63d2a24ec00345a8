"""Delta weights with Open-Sora's own networks: what is merged is loaded by each version's own loader."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from _harness import run_python

pytestmark = pytest.mark.host


def test_every_layout_is_loaded_by_the_host(host_root: Path, host_tag: str, tmp_path: Path) -> None:
    """The student itself, to the last bit, with the windows that it was trained for."""
    worker = str(Path(__file__).with_name("_delta_worker.py"))
    printed = run_python([worker, str(host_root), host_tag, str(tmp_path)], nproc=1, log=tmp_path / "log", cwd=tmp_path)
    found = json.loads(re.search(r"^RESULT (.*)$", printed, re.M)[1])
    assert len(found) == (4 if host_tag == "1.3" else 3) and set(found.values()) == {0.0}
