"""`opensora-perflow plan` and `curve` through Open-Sora 2.0's real inference.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from _harness import run_python
from _harness_v2 import inference_config_v2

from opensora_perflow.tools.open_sora_2 import NETWORK
from opensora_perflow.training.plan_file import windows_of

pytestmark = pytest.mark.host
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

MAKE = """
import sys, torch
from pathlib import Path
sys.path.append(sys.argv[3])
from opensora_perflow.tools.open_sora_2 import Scripts
Scripts(Path(sys.argv[1])).train_teacher(torch.zeros(1, 4, 3, 8, 8), ["a clip"], Path(sys.argv[2]), steps=1)
"""

COMPARE = """
import sys, torch
from opensora_perflow.hosts.v2.text import null_text
from opensora_perflow.tools import subjects_v2
calls = []
first_call = subjects_v2.first_call
subjects_v2.first_call = lambda *args: calls.append(first_call(*args)) or calls[0]
subject = subjects_v2.host_subject(sys.argv[1], sys.argv[2:], None)
(call,), probe = calls, subject.teacher(1, 0)
from opensora.utils.sampling import I2VDenoiser, get_schedule
layout, null = call.layout, null_text(dict(call.told))
rows = {name: torch.cat([call.told[name]] + 2 * [null.get(name, call.told[name])]) for name in call.told if name != "cond"}
zeros = torch.zeros_like(probe.noise)
with torch.no_grad():
    theirs = I2VDenoiser().denoise(
        call.network, img=layout.pack(probe.noise).repeat(3, 1, 1), **rows, masks=zeros[:, :1], masked_ref=zeros,
        timesteps=get_schedule(4, layout.rows * layout.columns, layout.frames), guidance=call.guidance, guidance_img=1.0,
        sigma_min=1e-5,
    )
ours = probe.sample([1.0, 0.75, 0.5, 0.25, 0.0])
print("guided by", call.guidance, "differs", (layout.unpack(theirs) - ours).abs().max().item())
"""

BY_WINDOW = """
import sys, torch
from opensora_perflow.tools import subjects_v2
from opensora_perflow.tools.subjects import Guided
calls = []
first_call = subjects_v2.first_call
subjects_v2.first_call = lambda *args: calls.append(first_call(*args)) or calls[0]
subject = subjects_v2.host_subject(sys.argv[1], sys.argv[3:], sys.argv[2])
(call,), probe = calls, subject.teacher(1, 0)
x, times = probe.noise, probe.flow_times([1.0, 0.5, 0.0])
for scale, t, t_next in zip((1.0, 3.0), times, times[1:]):
    field = subjects_v2._probes(call, call.network, Guided(scale))(1, 0)
    x = x + (t_next - t).float() * field.velocity(x, t)
print("branches", subject.branches, "differs", (x - probe.sample([1.0, 0.5, 0.0])).abs().max().item())
"""


@pytest.fixture(scope="module")
def weights(host2_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    run_python(
        ["-c", MAKE, str(host2_root), str(path), str(BENCHMARKS)], nproc=1, log=path.with_suffix(".log"), cwd=path.parent
    )
    return path


def inference_config(folder: Path, model: dict) -> Path:
    return inference_config_v2(folder / "sample.py", folder, folder / "samples", dtype="fp32", model={**NETWORK, **model})


def start(root: Path, folder: Path, command: str, *options: str, model: dict) -> str:
    config = inference_config(folder, model)
    script = str(root / "scripts" / "diffusion" / "inference.py")
    arguments = ["-m", "opensora_perflow", command, "--script", script, "--samples", "2", *options, "--", str(config)]
    return run_python(arguments, nproc=1, log=folder / "log", cwd=folder)


def test_the_curve_of_a_flux(host2_root: Path, weights: Path, tmp_path: Path) -> None:
    start(host2_root, tmp_path, "curve", "--max-steps", "2", "--out", "curve", model={"from_pretrained": str(weights)})
    rows = json.loads((tmp_path / "curve" / "curve.json").read_text())["rows"]
    assert [(row["steps"], row["nfe"]) for row in rows] == [(1, 2), (2, 4)]
    assert rows[0]["error"] > rows[1]["error"] > 0
    assert not list(tmp_path.rglob("*.mp4"))  # stopped before anything was sampled


def test_the_field_that_is_measured_is_the_hosts(host2_root: Path, weights: Path, tmp_path: Path) -> None:
    """Four uniform steps end where Open-Sora's own denoiser does."""
    config = inference_config(tmp_path, {"from_pretrained": str(weights)})
    script = str(host2_root / "scripts" / "diffusion" / "inference.py")
    printed = run_python(["-c", COMPARE, script, str(config)], nproc=1, log=tmp_path / "log", cwd=tmp_path)
    scale, error = map(float, re.search(r"guided by (\S+) differs (\S+)", printed).groups())
    # Float32 rounding of states of size 3 over four steps, times the guidance; the host's times are float32, ours float64.
    assert scale == 7.5 and error < 1e-4


@pytest.mark.parametrize("command", ["curve", "plan"])
def test_a_plan_for_a_student(host2_root: Path, weights: Path, tmp_path: Path, command: str) -> None:
    """The student is the teacher, whose guidance it knows to be 1: what it errs is what fewer steps err."""
    guided = {"windows": 2, "guidance": {"mode": "fixed", "scale": 1.0}}
    model = {"type": "perflow_flux", "from_pretrained": str(weights), "perflow": guided}
    options = {"curve": ["--max-steps", "2", "--out", "curve"], "plan": ["--windows", "2", "--out", "curve/plan.json"]}
    (tmp_path / "curve").mkdir()
    printed = start(host2_root, tmp_path, command, "--teacher", str(weights), *options[command], model=model)
    plan = tmp_path / "curve" / "plan.json"
    assert windows_of(str(plan)).num_windows == 2
    if command == "curve":
        rows = json.loads((tmp_path / "curve" / "curve.json").read_text())["rows"]
        assert [row["nfe"] for row in rows] == [1, 2]
        assert 'model = dict(type="perflow_flux", perflow=dict(windows="curve/plan.json"), ...)' in printed


def test_a_teacher_is_guided_window_by_window(host2_root: Path, weights: Path, tmp_path: Path) -> None:
    """As the student of the shipped configs, which have a scale a window: two Euler steps, each with its own."""
    guided = {"windows": 2, "guidance": {"mode": "fixed", "scale": [1.0, 3.0]}}
    config = inference_config(tmp_path, {"type": "perflow_flux", "from_pretrained": str(weights), "perflow": guided})
    arguments = [str(host2_root / "scripts" / "diffusion" / "inference.py"), str(weights), str(config)]
    printed = run_python(["-c", BY_WINDOW, *arguments], nproc=1, log=tmp_path / "log", cwd=tmp_path)
    assert "branches (2, 1) differs 0.0" in printed
