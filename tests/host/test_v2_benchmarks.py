"""World mmdit of benchmarks/few_step.py on Open-Sora 2.0's own network and denoiser, with very little work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _harness import run_python

pytestmark = pytest.mark.host
WORKER = Path(__file__).with_name("_mmdit_worker.py")


@pytest.fixture(scope="module")
def found(host2_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("mmdit")
    printed = run_python([str(WORKER), str(host2_root), str(folder)], nproc=1, log=folder / "log", cwd=folder)
    return json.loads(printed.splitlines()[-1])


def test_a_teacher_is_made_once(found: dict) -> None:
    assert found["same"]


def test_the_teacher_is_sampled_with_the_asked_steps(found: dict) -> None:
    """The endpoints are those of as many steps. A student was built meanwhile, whose denoiser gives others 50 by default."""
    assert found["before"]["endpoint_error"] == found["after"]["endpoint_error"] == 0


@pytest.mark.parametrize("recipe", ["ours", "reference", "stored"])
def test_a_student_goes_through_the_hooks(found: dict, recipe: str) -> None:
    """With a learning rate of 0 it stays the unguided teacher, which has its error to the last bit."""
    row = found[recipe]
    assert row["endpoint_error"] == found["unguided"]["endpoint_error"] > 0
    # 2 samples in 4 steps, after each of two training steps and at the end, there of the average as well: one row each, where
    # the denoiser asks for three.
    assert row["rows"] == 4 * 4 * 2


def test_the_teachers_evaluations_are_counted(found: dict) -> None:
    """Two steps of 8 or 16, as test_benchmarks.py counts them; the first step's look at the teacher is the same in both."""
    ours, reference = (found[name]["teacher_calls"] for name in ("ours", "reference"))
    assert ours > 2 * 8 and reference - ours == 2 * (16 - 8)
    # 3 chains of 4 windows with 8 evaluations each, by batches of 2; nothing else
    assert found["stored"]["teacher_calls"] == 3 * 4 * 8 / 2
