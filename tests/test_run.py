"""`python -m opensora_perflow.run`: what it says when it cannot run a script, and how it runs one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_perflow import run

REPOSITORY = Path(__file__).resolve().parents[1]

SCRIPT = """
import json, sys
from opensora.registry import SCHEDULERS
print(json.dumps({
    "name": __name__, "argv": sys.argv, "file": __file__, "path": sys.path[:2],
    "registered": sorted(SCHEDULERS.module_dict), "main": sys.modules["__main__"].__dict__ is globals(),
}))
sys.exit(len(sys.argv) - 2)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the parts of an Open-Sora checkout that matter here."""
    root = tmp_path / "Open-Sora"
    for relative, source in {
        "opensora/__init__.py": "",
        "opensora/registry.py": "from mmengine.registry import Registry\nSCHEDULERS = Registry('scheduler')\n",
        "scripts/train.py": SCRIPT,
        "scripts/misc/deep.py": "print('deep')",
        "scripts/diffusion/train.py": "",
    }.items():
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        (root / relative).write_text(source)
    return root


def start(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "opensora_perflow.run", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_a_script_runs_as_if_started_directly(checkout: Path, tmp_path: Path) -> None:
    import json

    script = checkout / "scripts" / "train.py"
    result = start(script, "--help", "config.py", "--flag=1", cwd=tmp_path)
    assert result.returncode == 2, result.stderr  # the script's own exit code: two arguments beyond --help
    seen = json.loads(result.stdout)
    assert seen["name"] == "__main__" and seen["main"]
    assert seen["argv"] == [str(script), "--help", "config.py", "--flag=1"] and seen["file"] == str(script)
    assert seen["path"] == [str(script.parent), str(checkout)]
    assert "perflow" in seen["registered"]
    lines = [line for line in result.stderr.splitlines() if line.startswith("[opensora_perflow] portable ")]
    names = [line.split()[2].rstrip(":") for line in lines]
    assert "script_assert" in names and len(names) == len(set(names))


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run.main(["--help"])
    text = capsys.readouterr().out
    torchrun = "torchrun --nproc_per_node 2 -m opensora_perflow.run"
    for expected in ("SCRIPT", torchrun, "inference.py", "--load", "perflow"):
        assert expected in text


def test_without_a_script_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main([])
    assert "SCRIPT" in capsys.readouterr().err


def test_a_missing_script_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main([str(tmp_path / "scripts" / "trian.py"), "config.py"])
    error = capsys.readouterr().err
    assert "trian.py" in error and "is not a file" in error and "ROOT/scripts/train.py" in error


def test_a_script_outside_a_checkout_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").write_text("")
    with pytest.raises(SystemExit, match="2"):
        run.main([str(tmp_path / "train.py")])
    error = capsys.readouterr().err
    assert "no folder above it holds the package 'opensora'" in error and "clone hpcaitech/Open-Sora" in error


def test_the_nearest_checkout_is_found(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.find_host_root(checkout / "scripts" / "train.py") == checkout.resolve()
    assert run.find_host_root(checkout / "scripts" / "misc" / "deep.py") == checkout.resolve()
    assert run.find_host_root(checkout / "scripts" / "diffusion" / "train.py") == checkout.resolve()
    monkeypatch.chdir(checkout)
    assert run.find_host_root("scripts/train.py") == checkout.resolve()
    with pytest.raises(ValueError, match="not a file"):
        run.find_host_root(checkout / "scripts")
