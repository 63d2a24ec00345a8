"""Every config that ships with Open-Sora, with its scheduler's type replaced by perflow and nothing else."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from _harness import SKIP_REASON, host_roots, run_python, tag_of

pytestmark = pytest.mark.host
PATHS = {"rflow": "Linear", "iddpm": "DDPM", "iddpm-speed": "DDPM", "dpm-solver": "DDPM"}
CONFIGS = [
    (root, str(path.relative_to(root)))
    for root in host_roots()
    for path in sorted((root / "configs").rglob("*.py"))
    if re.search(r"^scheduler\s*=", path.read_text(), re.MULTILINE)
]
NONE = [pytest.param((None, ""), marks=pytest.mark.skip(reason=SKIP_REASON), id="no-checkout")]


@cache
def read_all(root: Path) -> dict[str, dict[str, Any] | None]:
    """Every config of a checkout, read in one process with that checkout's `opensora`."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "configs.json"
        command = [str(Path(__file__).with_name("_config_worker.py")), str(root), str(out)]
        run_python(command, nproc=1, log=Path(folder) / "worker.log", cwd=Path(folder), timeout=300)
        return json.loads(out.read_text())


@pytest.fixture
def result(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    root, path = request.param
    return tag_of(root), read_all(root)[path]


@pytest.mark.parametrize(
    "result",
    [pytest.param(case, id=f"v{tag_of(case[0])}/{case[1].removeprefix('configs/')}") for case in CONFIGS] or NONE,
    indirect=True,
)
def test_type_alone_switches_a_config(result: tuple[str, dict[str, Any]]) -> None:
    tag, found = result
    original = dict(found["original"])
    upstream = original.pop("type")
    # Under 1.2 and 1.3 a dpm-solver's keys are an rflow's too; then only STDiT3, which never was a diffusion, tells.
    shared = set(original) <= {"num_sampling_steps", "cfg_scale"}
    if tag in ("1.2", "1.3") and shared and not found["model"].startswith("STDiT3"):
        assert 'write path="ddpm" for a network that iddpm trained' in found["error"]
        return
    assert "error" not in found, found["error"]
    assert found["path"] == PATHS[upstream]
    assert found["prediction"] == {"Linear": "velocity", "DDPM": "ddim_eps"}[found["path"]]
    assert found["kept"] == original and found["num_timesteps"] == 1000
    assert found["sampling_steps"] == (original.get("num_sampling_steps") or 4)
    assert found["guided_channels"] == original.get("cfg_channel", 3 if tag == "1.0" else None)


def test_the_configs_of_all_four_schedulers_were_read() -> None:
    if not CONFIGS:
        pytest.skip(SKIP_REASON)
    for root in host_roots():
        found = [value for value in read_all(root).values() if value is not None]
        seen = {value["original"]["type"] for value in found}
        expected = {"1.0": {"iddpm", "dpm-solver"}, "1.1": {"iddpm", "iddpm-speed", "dpm-solver"}}
        assert seen == expected.get(tag_of(root), set(PATHS))
        assert len(found) == sum(case[0] == root for case in CONFIGS)
