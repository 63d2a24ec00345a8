"""`opensora-perflow plan` and `curve`, on the mixture and through an inference script."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.v1.negative_text import write_negative
from opensora_perflow.method.grids import sampling_grid
from opensora_perflow.method.metrics import endpoint_error
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.planning.fine_path import follow
from opensora_perflow.planning.probe import Probe
from opensora_perflow.planning.windows import CRITERIA, plan_windows
from opensora_perflow.tools.cli import main
from opensora_perflow.tools.subjects import Subject, demo_subject
from opensora_perflow.training.plan_file import read_plan, windows_of
from opensora_perflow.training.state import METADATA_KEY, StudentState, write_state
from opensora_perflow.worlds.mixture import Mixture, MixtureNetwork

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = ["--model", "mixture", "--samples", "8"]

SCRIPT = '''
"""Builds and samples as Open-Sora's scripts/inference.py does."""
import sys
import torch
from opensora.registry import SCHEDULERS
from opensora_perflow.worlds.model import load_teacher
from opensora_perflow.worlds.text import TinyTextEncoder
def main():
    model, text_encoder = load_teacher(), TinyTextEncoder()
    text_encoder.y_embedder = model.y_embedder
    kind, references = sys.argv[1:3]
    config = dict(type=kind, cfg_scale=3.0, use_timestep_transform=True)
    if kind == "perflow":
        config.update(windows=2, guidance=dict(mode="fixed", scale=3.0))
    config.update(eval(sys.argv[3]) if len(sys.argv) > 3 else {})
    cfg = dict(scheduler=config, model=dict(from_pretrained=config.pop("weights", None)))
    if kind == "none":
        return
    scheduler = SCHEDULERS.build(config)
    sizes = {key: torch.full((2,), float(value)) for key, value in
             dict(height=360, width=360, num_frames=51, ar=1, fps=8).items()}
    noise = dict(z=torch.zeros(2, 4, 5, 8, 8))
    scheduler.sample(model, text_encoder, prompts=["a red circle moving right", "a blue square"],
                     device="cpu", additional_args=sizes, progress=False, **{**noise, **eval(references)})
    raise SystemExit("the script went on after its first sample")
main()
'''


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "Open-Sora"
    for relative, source in {
        "opensora/__init__.py": "",
        "opensora/registry.py": "from mmengine.registry import Registry\nSCHEDULERS = Registry('scheduler')\n",
        "scripts/inference.py": SCRIPT,
    }.items():
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        (root / relative).write_text(source)
    return root / "scripts" / "inference.py"


@pytest.fixture
def student(tmp_path):
    torch.manual_seed(0)
    network = MixtureNetwork(Mixture.standard(), width=8)
    torch.nn.init.normal_(network.layers[-1].weight, std=0.1)
    write_state_dict(tmp_path / "student.safetensors", network.state_dict(), {"format": "pt"})
    return tmp_path / "student.safetensors"


def bent(count, seed):
    """v = 6 (1/2 - t) below t = 1/2 and 0 above; an Euler step errs by 3 h^2, with h its width below 1/2."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return Probe(lambda x, t: 6 * (0.5 - t).clamp(min=0).to(x.dtype)[:, None].expand_as(x), noise)


def test_a_plan_holds_the_grids_that_beat_uniform_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("opensora_perflow.tools.plan.demo_subject", lambda *settings: Subject("bent", bent))
    out = tmp_path / "plans" / "plan.json"
    assert main(["plan", "--steps", "2", "3", "8", "--candidates", "8", "--samples", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    # 2 steps: halves of the bent half, 2 * 3 / 16; 3 steps: an eighth, an eighth and a quarter of it. 8 steps of 8 candidates
    # are the uniform ones.
    assert read_plan(out) == ((1.0, 0.0), ((1.0, 0.25, 0.0), (1.0, 0.375, 0.25, 0.0)))
    compared = json.loads(out.read_text())["report"]["grids"]
    assert compared["2"]["error"] == pytest.approx(3 / 8, rel=1e-3) and compared["2"]["uniform"] == pytest.approx(
        3 / 4, rel=1e-3
    )
    assert compared["3"]["error"] == pytest.approx(9 / 32, rel=1e-3)
    assert "8 steps: no grid was found that beats uniform steps" in printed and out.with_suffix(".png").is_file()


def test_a_plan_for_a_student_has_the_students_windows_and_steps(tmp_path, capsys, monkeypatch):
    def twice(count, seed):
        probe = bent(count, seed)
        return Probe(lambda x, t: 2 * probe.velocity(x, t), probe.noise)

    subject = Subject("bent", bent, twice, TimeWindows((1.0, 0.6, 0.0)), branches=(2, 1))
    monkeypatch.setattr("opensora_perflow.tools.plan.demo_subject", lambda *settings: subject)
    out = tmp_path / "plan.json"
    assert main(["plan", "--steps", "2", "--candidates", "8", "--samples", "2", "--out", str(out)]) == 0
    assert read_plan(out) == ((1.0, 0.6, 0.0), ((1.0, 0.25, 0.0),))
    # From 1/4 on, 12 / 16 is all that the teacher's way is long; its own steps there would err by 3 / 8.
    assert json.loads(out.read_text())["report"]["grids"]["2"]["error"] == pytest.approx(0, abs=1e-3)
    assert re.search(r"^ +2 +2 +0\.75", capsys.readouterr().out, re.M)  # an evaluation a step


def test_a_students_plan_beats_its_own_grid_too(tmp_path, capsys, monkeypatch):
    subject = Subject("bent", bent, bent, TimeWindows((1.0, 0.25, 0.0)))
    monkeypatch.setattr("opensora_perflow.tools.plan.demo_subject", lambda *settings: subject)
    assert main(["plan", "--steps", "2", "--candidates", "8", "--samples", "2", "--out", str(tmp_path / "plan.json")]) == 1
    assert "no grid was found that beats uniform steps and the windows' own" in capsys.readouterr().out


def test_a_curve_has_the_average_beside_the_weights_of_a_step(tmp_path, capsys, monkeypatch):
    """An average that is the teacher's own field errs by 3 / 8, as its steps do on these windows; the raw student goes twice as
    far."""

    def twice(count, seed):
        probe = bent(count, seed)
        return Probe(lambda x, t: 2 * probe.velocity(x, t), probe.noise)

    windows = TimeWindows((1.0, 0.25, 0.0))
    subject = Subject("bent", bent, twice, windows, average=bent)
    monkeypatch.setattr("opensora_perflow.tools.plan.demo_subject", lambda *settings: subject)
    assert main(["curve", "--max-steps", "2", "--samples", "2", "--out", str(tmp_path)]) == 0
    assert "average error" in capsys.readouterr().out
    row = json.loads((tmp_path / "curve.json").read_text())["rows"][1]
    assert row["average"] == pytest.approx(0.375, abs=1e-3) and abs(row["error"] - 0.375) > 0.1


def test_where_nothing_beats_uniform_steps_no_plan_is_written(tmp_path, capsys):
    # As many candidates as steps: the uniform grid is the only one.
    status = main(["plan", *SMALL, "--steps", "4", "--candidates", "4", "--out", str(tmp_path / "plan.json")])
    assert status == 1 and not (tmp_path / "plan.json").exists()
    assert "4 steps: no grid was found that beats uniform steps" in capsys.readouterr().out


@pytest.mark.parametrize("criterion", ["added", "local"])
def test_windows_are_planned_from_a_pilot(criterion, tmp_path, student, capsys):
    out = tmp_path / "plan.json"
    options = ["--windows", "3", "--student", str(student), "--student-windows", "1", "0.5", "0", "--out", str(out)]
    options += ["--criterion", criterion]
    assert main(["plan", *SMALL, *options]) == 0
    windows = windows_of(str(out))
    assert windows.num_windows == 3 and windows.grids == () and out.with_suffix(".png").is_file()
    report = json.loads(out.read_text())["report"]
    assert report["criterion"] == criterion and report["pilot_edges"] == [1.0, 0.5, 0.0]
    subject = demo_subject("mixture", student, TimeWindows.uniform(2), None)
    path = follow(subject.teacher(8, 0), (1.0, 0.5, 0.0), substeps=32, method="heun")
    errors = CRITERIA[criterion](subject.student(8, 0), path)
    assert report["pilot_errors"] == pytest.approx(errors, rel=1e-5)
    assert windows.edges == plan_windows((1.0, 0.5, 0.0), errors, 3)[0]
    said = capsys.readouterr().out
    shares = f"draws=dict(shares={[round(error / sum(errors), 4) for error in report['pilot_errors']]})"
    assert "planned windows" in said and (shares in said) == (criterion == "added")


def test_a_students_windows_are_those_that_its_file_names(tmp_path, student):
    network = MixtureNetwork(Mixture.standard(), width=8)
    state = StudentState(windows=(1.0, 0.7, 0.0), transform=None, path="linear", prediction="velocity",
                         guidance={}, teacher=None, teacher_source=None, stage=1)  # fmt: skip
    named = tmp_path / "named.safetensors"
    write_state_dict(named, network.state_dict(), {"format": "pt", METADATA_KEY: state.to_json()})
    for file, windows, edges in (
        (named, [], [1.0, 0.7, 0.0]),
        (named, ["--student-windows", "2"], [1.0, 0.5, 0.0]),
        (student, [], [1.0, 0.75, 0.5, 0.25, 0.0]),
    ):
        assert main(["curve", *SMALL, "--student", str(file), *windows, "--max-steps", "1", "--out", str(tmp_path / "c")]) == 0
        assert list(windows_of(str(tmp_path / "c" / "plan.json")).edges) == edges


def test_a_curve_writes_a_grid_for_every_number_of_steps(tmp_path, student, capsys):
    options = ["--student", str(student), "--student-windows", "2", "--max-steps", "5", "--out", str(tmp_path / "curve")]
    assert main(["curve", *SMALL, *options]) == 0
    windows = windows_of(str(tmp_path / "curve" / "plan.json"))
    assert windows.edges == (1.0, 0.5, 0.0) and [len(grid) - 1 for grid in windows.grids] == [1, 2, 3, 4, 5]
    rows = json.loads((tmp_path / "curve" / "curve.json").read_text())["rows"]
    assert [row["nfe"] for row in rows] == [1, 2, 3, 4, 5] and "planned error" in capsys.readouterr().out
    # The numbers are those of the sampler on fresh noise: the default grid of 5 steps, and the plan's.
    subject = demo_subject("mixture", student, TimeWindows.uniform(2), None)
    endpoints = follow(subject.teacher(8, 1000), 64, substeps=2, method="heun").endpoints
    for key, made in (("error", TimeWindows.uniform(2)), ("planned", windows)):
        x = subject.student(8, 1000).sample(sampling_grid(made, 5))
        assert rows[4][key] == pytest.approx(endpoint_error(x, endpoints), rel=1e-5)
    assert (tmp_path / "curve" / "curve.png").is_file()


def test_a_teachers_curve_has_its_own_evaluations(tmp_path):
    assert main(["curve", *SMALL, "--max-steps", "3", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "curve.json").read_text())["rows"]
    assert [row["nfe"] for row in rows] == [2, 4, 6] and rows[0]["error"] > rows[1]["error"] > rows[2]["error"]
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["plan", "--steps", "0"], "--steps must be an integer >= 1"),
        (["plan", "--steps", "8", "--candidates", "4"], "--steps 8 needs as many candidate times"),
        (["plan", "--samples", "0"], "--samples must be an integer >= 1"),
        (["plan", "--windows", "4"], "windows are planned from what a pilot student measures"),
        (["plan", "--windows", "0"], "--windows must be an integer >= 1"),
        (["plan", "--windows", "65"], "--windows must be at most 64, got 65"),
        (["plan", "--out", "plan.png"], "--out must end in .json, by which windows= knows a plan, got 'plan.png'"),
        (["plan", "--guidance-scale", "-1"], "--guidance-scale must be"),
        (["plan", "--teacher", "weights.pt"], "belongs to an inference script; name it with --script"),
        (["plan", "--script", "a.py", "--student", "b.pt"], "name its teacher with --teacher"),
        (["plan", "--script", "a.py"], "SCRIPT must be the path of a Python file"),
        (["plan", "--student-windows", "1", "x", "0"], "--student-windows: could not convert"),
        (["plan", "--criterion", "added"], "there is no --windows for --criterion; leave out"),
        (["plan", "--windows", "4", "--steps", "8"], "--windows plans by measured windows, not --steps; leave out"),
        (["plan", "--windows", "4", "--candidates", "32"], "not --candidates; leave out"),
        (["plan", "--script", "a.py", "--model", "video"], "the script's config says what --model would"),
        (["curve", "--script", "a.py", "--guidance-scale", "3"], "the script's config says what --guidance-scale would"),
        (["curve", "--script", "a.py", "--student-windows", "4"], "the script's config says what --student-windows would"),
        (["curve", "--student-windows", "4"], "there is none; name it with --student"),
        (["curve", "--student", "missing.safetensors"], "missing.safetensors"),
        (["curve", "--max-steps", "0"], "--max-steps must be an integer >= 1"),
        (["curve", "--samples", "1"], "--samples must be >= 2"),
    ],
)
def test_mistakes_are_one_line(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


def start(checkout, command, *options, host):
    """A process of its own: run.prepare changes sys.path and the machine's gaps for good."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    arguments = [command, "--script", str(checkout), "--samples", "2", *options, "--", *host]
    return subprocess.run(
        [sys.executable, "-m", "opensora_perflow", *arguments],
        cwd=checkout.parent, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_an_inference_script_is_planned_up_to_its_first_sample(checkout):
    result = start(checkout, "plan", "--steps", "2", "--candidates", "4", "--out", "p.json", host=["rflow", "{}"])
    assert result.returncode in (0, 1), result.stderr
    assert "Endpoint errors" in result.stdout and (checkout.parent / "p.png").is_file()
    assert "went on" not in result.stderr


def test_a_hosts_student_is_compared_with_the_teacher_it_came_from(checkout):
    from opensora_perflow.worlds.model import WEIGHTS

    result = start(checkout, "curve", "--teacher", str(WEIGHTS), "--max-steps", "3", "--out", "c", host=["perflow", "{}"])
    assert result.returncode == 0, result.stderr
    windows = windows_of(str(checkout.parent / "c" / "plan.json"))
    assert windows.edges == (1.0, 0.5, 0.0) and len(windows.grids) == 3
    rows = json.loads((checkout.parent / "c" / "curve.json").read_text())["rows"]
    assert [row["nfe"] for row in rows] == [1, 2, 3]


def test_a_hosts_student_keeps_the_windows_of_its_checkpoint(checkout):
    """Named by no config: perflow.json has windows and guidance."""
    from opensora_perflow.worlds.model import WEIGHTS

    state = StudentState(windows=(1.0, 0.6, 0.0), transform=None, path="linear", prediction="velocity",
                         guidance=dict(mode="fixed", scale=3.0))  # fmt: skip
    write_state(checkout.parent, state)
    bare = repr(dict(type="perflow", weights=str(checkout.parent)))
    options = ["--teacher", str(WEIGHTS), "--max-steps", "1", "--out", "c"]
    result = start(checkout, "curve", *options, host=["student", "{}", bare])
    assert result.returncode == 0, result.stderr
    assert windows_of(str(checkout.parent / "c" / "plan.json")).edges == (1.0, 0.6, 0.0)
    assert json.loads((checkout.parent / "c" / "curve.json").read_text())["rows"][0]["nfe"] == 1


def test_the_teacher_is_led_away_from_the_negative_prompt_that_was_folded_in(checkout):
    """And not, as it was, from the null text whatever the student had learned: the same weights, measured against both."""
    from opensora_perflow.worlds.model import WEIGHTS, load_teacher
    from opensora_perflow.worlds.text import TinyTextEncoder

    encoder, rows = TinyTextEncoder(), {}
    encoder.y_embedder = load_teacher().y_embedder
    write_negative(checkout.parent / "prompt.safetensors", encoder, "a blue square")
    for name in (None, "prompt.safetensors"):
        changes = dict(guidance=dict(mode="fixed", scale=3.0, negative=name))
        options = ["--teacher", str(WEIGHTS), "--max-steps", "1", "--out", "c"]
        result = start(checkout, "curve", *options, host=["perflow", "{}", repr(changes)])
        assert result.returncode == 0, result.stderr
        rows[name] = json.loads((checkout.parent / "c" / "curve.json").read_text())["rows"][0]["error"]
    assert rows["prompt.safetensors"] > 2 * rows[None]  # the weights were not trained for it


def test_a_hosts_student_is_told_its_scale(checkout):
    """mode range: one evaluation a step, of a network that is told. Told 1 it is the unguided network, to the last bit."""
    from opensora_perflow.worlds.model import WEIGHTS

    found = {}
    for name, changes in {
        "told": dict(cfg_scale=1.0, guidance=dict(mode="range", scale=(1.0, 4.0))),
        "unguided": dict(guidance=dict(mode="fixed", scale=1.0)),
        "told 4": dict(cfg_scale=4.0, guidance=dict(mode="range", scale=(1.0, 4.0))),
    }.items():
        options = ["--teacher", str(WEIGHTS), "--max-steps", "1", "--out", name]
        result = start(checkout, "curve", *options, host=["perflow", "{}", repr(changes)])
        assert result.returncode == 0, result.stderr
        found[name] = json.loads((checkout.parent / name / "curve.json").read_text())["rows"][0]
    assert found["told"] == found["unguided"] and found["told"]["nfe"] == found["told 4"]["nfe"] == 1
    assert found["told 4"]["error"] > found["told"]["error"] > 0  # it was not trained to be told anything


@pytest.mark.parametrize(
    "host, message",
    [
        (["perflow", "{}", "dict(guidance=dict(mode='sync'), cfg_scale=[3, 2])"], "one guidance scale in all windows"),
        (["perflow", "{}", "dict(guidance=dict(mode='fixed', scale=[3, 2]))"], "got guidance.scale [3, 2]"),
        (["perflow", "{}", "dict(cfg_scale=9.0, guidance=dict(mode='range', scale=(1, 4)))"], "scales from 1 to 4"),
        (["perflow", "{}", "dict(draws=dict(grids=[1], two_time=True))"], "with draws.two_time and is told the length"),
        (["rflow", "{}"], "has scheduler type rflow, which is a teacher itself"),
    ],
)
def test_students_that_cannot_be_compared_with_a_teacher(checkout, host, message):
    from opensora_perflow.worlds.model import WEIGHTS

    result = start(checkout, "curve", "--teacher", str(WEIGHTS), host=host)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "host, message",
    [
        (["iddpm", "{}"], "scheduler type rflow or perflow, got 'iddpm'"),
        (["none", "{}"], "ended without sampling"),
        (["rflow", "dict(mask_index=[0])"], "a plan is made for text to video"),
        (["rflow", "dict(mask=torch.tensor([[0.0, 1, 1, 1, 1]] * 2))"], "a plan is made for text to video"),
        (["rflow", "dict(z=None, z_size=(4, 5, 8, 8))"], "this script samples another model"),
    ],
)
def test_scripts_that_cannot_be_planned(checkout, host, message):
    result = start(checkout, "plan", "--steps", "2", "--candidates", "4", host=host)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_a_file_in_the_place_of_the_curve_s_folder_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "curve").touch()
    assert main(["curve", "--out", str(tmp_path / "curve"), "--samples", "1000000000"]) == 2
    assert "--out must be a folder" in capsys.readouterr().err
