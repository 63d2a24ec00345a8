"""`opensora-perflow demo` with Open-Sora 2.0's own MMDiT, and very little work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _harness import run_python

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.training.state import find_state

pytestmark = pytest.mark.host
SMALL = ["--iterations", "2", "--num-clips", "3", "--num-samples", "2", "--batch-size", "2"]
TEACHER = "mmdit_teacher.safetensors"


def demo(root: Path, folder: Path, *options: str) -> str:
    command = ["-m", "opensora_perflow", "demo", "--open-sora", str(root), *SMALL, *options]
    return run_python(command, nproc=1, log=folder / "log", cwd=folder)


@pytest.fixture(scope="module")
def finished(host2_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo2")
    return folder, demo(host2_root, folder, "--teacher-iterations", "2")


def test_a_student_of_the_hosts_class_is_trained_and_shown(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    out = folder / "perflow_demo"
    result = json.loads((out / "results.json").read_text())
    assert "stage 2 of 6: training a teacher" in printed and "stage 6 of 6" in printed
    assert result["network"] == "opensora.MMDiTModel"
    # A guided step of Open-Sora 2.0's sampler is three rows; the reference is 36 midpoint steps of two evaluations of two.
    assert [row["nfe"] for row in result["samplers"]] == [144, 90, 12, 4, 4]
    assert result["samplers"][0]["endpoint_error"] == 0 and result["samplers"][3]["endpoint_error"] > 0
    assert (out / "report.html").is_file() and (out / "side_by_side.mp4").is_file()
    state, _ = find_state(out / "student.safetensors")
    assert state.transform == {"formula": "v2.0", "flow_shift": None} and state.guidance["scale"] == 3.0 and state.steps == 2
    student, teacher = (read_state_dict(out / name) for name in ("student.safetensors", TEACHER))
    assert student.keys() == teacher.keys()


def test_the_teacher_is_trained_once(host2_root: Path, finished: tuple[Path, str]) -> None:
    """The second demo reads it and, from the same seed, finds the same numbers."""
    folder, _ = finished
    file, before = folder / "perflow_demo" / TEACHER, json.loads((folder / "perflow_demo" / "results.json").read_text())
    written = file.read_bytes()
    printed = demo(host2_root, folder, "--teacher-iterations", "1")
    after = json.loads((folder / "perflow_demo" / "results.json").read_text())
    assert "stage 5 of 5" in printed and "training the teacher" not in printed and file.read_bytes() == written
    errors = ([row["endpoint_error"] for row in result["samplers"]] for result in (before, after))
    assert next(errors) == next(errors)


def test_another_file_of_that_name_stays(host2_root: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "perflow_demo").mkdir()
    other = tmp_path / "perflow_demo" / TEACHER
    other.write_bytes((finished[0] / "perflow_demo" / "student.safetensors").read_bytes())
    with pytest.raises(AssertionError, match="is no teacher that a demo trained; move it away"):
        demo(host2_root, tmp_path)
    assert [path.name for path in other.parent.iterdir()] == [TEACHER]
