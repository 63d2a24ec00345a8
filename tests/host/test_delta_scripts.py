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


@pytest.mark.parametrize("mode", ["fixed", "range"])
def test_adapters_of_2_0_become_a_delta_and_adapters_again(host2_root: Path, tmp_path: Path, mode: str) -> None:
    """A network of Open-Sora 2.0 that got the delta, and one with the adapters of its rank, answer as the student."""
    worker, folder = str(Path(__file__).with_name("_delta_v2_worker.py")), tmp_path / mode
    folder.mkdir()
    printed = run_python([worker, str(host2_root), str(folder)], nproc=1, log=tmp_path / "log", cwd=tmp_path)
    found = json.loads(re.search(r"^RESULT (.*)$", printed, re.M)[1])
    # A range's own weights are in no base, so that the base is not known.
    refused = found.pop("refused", None)
    assert mode == "range" or "were trained on another base than" in refused
    assert found.pop("moved") > 1e-2 and len(found) == 5
    # Float32: W x + B A x is rounded otherwise than (W + B A) x, and so are singular vectors.
    assert max(found.values()) < 1e-4, found
