"""The demo as a user starts it, with everything made small."""

import json
import logging
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from opensora_perflow import __version__
from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.tools import cli, compare, demo, threads
from opensora_perflow.training.record import read_record
from opensora_perflow.training.state import find_state
from opensora_perflow.training.teacher import fingerprint
from opensora_perflow.worlds.clips import COLORS, read_clips, write_clips
from opensora_perflow.worlds.model import load_teacher
from opensora_perflow.worlds.tables import read_table
from opensora_perflow.worlds.videos import write_video

FEW = ["--iterations", "2", "--num-samples", "2", "--batch-size", "2"]
SMALL = [*FEW, "--num-clips", "3"]


@pytest.fixture(autouse=True)
def coarse_reference(monkeypatch):
    monkeypatch.setattr(compare, "REFERENCE", (2,) * 4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "REFERENCE", (2,) * 4)
        assert cli.main(["demo", "--out", str(out), *SMALL]) == 0
    return out


def test_everything_that_is_promised_is_there(finished):
    names = {path.name for path in finished.iterdir()}
    files = {
        "side_by_side.mp4",
        "frames.png",
        "training.png",
        "results.json",
        "student.safetensors",
        "report.html",
        "record.jsonl",
    }
    assert names == {"clips", *files}

    with av.open(str(finished / "side_by_side.mp4")) as container:
        video = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(video) == 68 and video.std() > 10  # 8 s of 17 frames, 8 a second


def test_numbers_are_those_of_the_samplers(finished):
    result = json.loads((finished / "results.json").read_text())
    assert [row["nfe"] for row in result["samplers"]] == [32, 60, 8, 4, 4]  # the reference is 8 guided midpoint steps here
    assert result["samplers"][0]["endpoint_error"] == 0 and result["samplers"][3]["endpoint_error"] > 0
    # two steps have one weight of the average each, so that it is the last step's
    assert result["samplers"][4]["endpoint_error"] == result["samplers"][3]["endpoint_error"]
    assert 0 < result["cpu_seconds"]
    assert [row["t_start"] for row in result["windows"]] == [1, 0.90625, 0.796875, 0.53125]
    assert result["network"] == "opensora_perflow.TinySTDiT"
    # The last window points at its own end, where the reference's motion is known.
    assert result["windows"][3]["motion"]["teacher"] == pytest.approx(result["samplers"][0]["motion_energy"], rel=1e-4)
    assert all(row["motion"]["error"] > 0 for row in result["windows"])
    lines = demo.report.table(result).splitlines()
    share = result["windows"][0]["motion"]["student"] / result["windows"][0]["motion"]["teacher"]
    assert lines[-1].startswith("the student's motion") and f"1-0.906 {share:.0%}" in lines[-1]


def test_the_page_shows_the_run(finished):
    result, text = json.loads((finished / "results.json").read_text()), (finished / "report.html").read_text()
    assert f"<h1>{finished.name}</h1>" in text and "data:video/mp4" in text and "student, 4 steps" in text
    assert len(result["loss"]["history"]) == 2 and result["versions"]["torch"] == torch.__version__
    assert f'<td>torch</td><td class="value">{torch.__version__}</td>' in text


def test_the_record_and_the_page_have_each_window(finished):
    lines = [line for line in read_record(finished) if line["kind"] == "step"]
    assert len(lines) == 2 and all(len(line["window_loss"]) == 4 for line in lines)
    text = (finished / "report.html").read_text()
    assert "Loss of each window" in text and "The run wrote no record" not in text


def test_paths_lead_from_noise_to_the_teachers_end(finished):
    paths = json.loads((finished / "results.json").read_text())["paths"]
    assert len(paths["teacher"]) == len(paths["student"]) == len(paths["prompts"]) == 2
    for teacher, student in zip(paths["teacher"], paths["student"]):
        assert teacher[0] == student[0] == [0, 0] and teacher[-1] == [1, 0]
        assert len(teacher) == len(paths["times"]) == 9 and len(student) == 5
    assert "Windows over the teacher&#39;s path" in (finished / "report.html").read_text()


def test_the_student_is_trained_and_can_be_loaded(finished):
    state, teacher = read_state_dict(finished / "student.safetensors"), load_teacher().state_dict()
    found, _ = find_state(finished / "student.safetensors")
    assert found.windows == compare.WINDOWS and found.guidance["mode"] == "fixed"
    assert found.steps > 0 and found.teacher == fingerprint(load_teacher())
    assert state.keys() == teacher.keys()
    assert any(not torch.equal(state[key], teacher[key]) for key in state)
    assert torch.equal(state["y_embedder.y_embedding"], teacher["y_embedder.y_embedding"])


def test_own_videos_with_a_corrupt_one(tmp_path, caplog, capsys):
    clips = write_clips(tmp_path / "mine", 3, seed=5).parent
    (clips / "broken.mp4").write_bytes(b"no video")
    (clips / "clips.csv").unlink()
    with caplog.at_level(logging.WARNING):
        assert cli.main(["demo", "--videos", str(clips), "--out", str(tmp_path / "out"), *FEW]) == 0
    messages = " ".join(record.message for record in caplog.records)
    assert "broken.mp4" in messages and "skipped 1 of 4 videos" in messages
    assert "student, 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--iterations", "0"], "iterations must be an integer >= 1, got 0"),
        (["--num-samples", "1"], "num_samples must be >= 2"),
        (["--guidance-scale", "-1"], "guidance_scale must be a number >= 0"),
        (["--videos", "nowhere"], "nowhere"),
        (["--open-sora", "nowhere"], "must be the root of an Open-Sora v1.2.0, v1.3 or 2.0 checkout"),
    ],
)
def test_mistakes_are_one_line_and_touch_nothing(options, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["demo", "--out", str(out), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("opensora-perflow: ") and message in error
    assert not out.exists()


def test_an_environment_without_the_hosts_packages_is_told(tmp_path):
    for name in ("opensora/__init__.py", "opensora/models/mmdit/model.py", "scripts/diffusion/train.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    command = [sys.executable, "-m", "opensora_perflow", "demo", "--open-sora", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "its modules cannot be imported here (No module named" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, message",
    [({"lr": 0}, "lr must be > 0"), ({"seed": -1}, "seed must be an integer >= 0"), ({"seed": 10**23}, "at most")],
)
def test_settings_that_no_demo_has_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        demo.DemoSettings(**settings)


def test_an_empty_folder_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["demo", "--videos", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    assert "video" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_own_clips_are_shown_and_unknown_captions_named(tmp_path, caplog):
    (tmp_path / "mine").mkdir()
    for color, name in (("red", "ein Hund"), ("green", "a red circle moving left")):
        frames = np.full((17, 64, 64, 3), COLORS[color], np.uint8)
        write_video(tmp_path / "mine" / f"{name}.mp4", frames)
    with caplog.at_level(logging.WARNING):
        assert cli.main(["demo", "--videos", str(tmp_path / "mine"), "--out", str(tmp_path / "out"), *FEW]) == 0
    messages = [record.message for record in caplog.records if "does not know" in record.message]
    assert len(messages) == 1 and "1 of your 2: 'ein hund'" in messages[0]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["unknown_captions"] == ["ein hund"]
    with av.open(str(tmp_path / "out" / "side_by_side.mp4")) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    first_row = frame[36 : 36 + 180]
    for color in ("red", "green"):
        assert (np.abs(first_row - COLORS[color]).sum(axis=-1) < 60).sum() > 20_000  # most of 192 x 192 pixels


def test_earlier_outputs_are_no_clips(tmp_path):
    videos = write_clips(tmp_path / "F", 1, seed=5).parent
    (videos / "clips.csv").unlink()
    mine = next(videos.iterdir()).rename(videos / "mine.mp4").name
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    for out in (videos / "deeper" / "perflow_demo", videos):
        write_clips(out / "clips", 1)
        write_video(out / "side_by_side.mp4", frames)
        for name in ("results.json", "student.safetensors"):
            (out / name).write_text("{}")
        assert [path.name for path in demo._clips(demo.DemoSettings(videos=videos, out=out)).paths] == [mine]
    # the clips of an earlier demo, asked for by name
    assert len(demo._clips(demo.DemoSettings(videos=videos / "clips", out=videos)).paths) == 1


def test_the_table_of_clips_names_them_where_they_are(finished):
    found = read_clips(finished / "clips" / "clips.csv")
    assert len(found) == 3 and {path.parent for path in found.paths} == {finished / "clips"}
    assert all(str(finished / "clips") in row.cells["path"] for row in read_table(finished / "clips" / "clips.csv"))


def test_a_full_disk_leaves_the_earlier_run(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert cli.main(["demo", "--out", str(out), *SMALL]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo.report, "write_result", full)
    assert cli.main(["demo", "--out", str(out), "--seed", "1", *SMALL]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("No space left on device")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["demo", "install", "embed", "plan", "curve"])
def test_ctrl_c_is_one_line_and_status_130(command, monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, command, stop)
    needed = {"install": ["root"], "embed": ["config", "prompt"], "plan": ["config"], "curve": ["config"]}
    assert cli.main([command, *needed.get(command, [])]) == 130
    assert capsys.readouterr().err.splitlines() == [
        "opensora-perflow: stopped by Ctrl-C; files that were complete before are kept"
    ]


def test_ctrl_c_in_a_running_demo(tmp_path):
    out = tmp_path / "out"
    (out / "clips").mkdir(parents=True)
    (out / "clips" / "mine.txt").write_text("mine")
    command = [sys.executable, "-m", "opensora_perflow.tools.cli", "demo", "--out", str(out), "--num-clips", "2"]
    # A suite in the background of a shell passes on that Ctrl-C is ignored.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    text = ""
    while "following" not in text and process.poll() is None:
        text += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    text += process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in text
    assert text.splitlines()[-1].endswith("opensora-perflow: stopped by Ctrl-C; files that were complete before are kept")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == ["out/clips/mine.txt"]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["demo", "--help"])
    text = capsys.readouterr().out
    for expected in ("--videos", "--open-sora", "side_by_side.mp4", "two minutes", "--quick", "default 100"):
        assert expected in text


def test_every_help_teaches_at_once():
    """No warnings, an example, and nothing loaded beside torch that takes long: .9 of 2.4 CPU seconds were matplotlib's."""
    script = (
        "import contextlib, io, sys\n"
        "from opensora_perflow.tools.cli import main\n"
        "commands = 'demo report install embed merge export estimate plan curve encode store check doctor ui'.split()\n"
        "for command in [[one] for one in commands] + [['delta', one] for one in ('make', 'merge', 'inspect')]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):\n"
        "        main([*command, '--help'])\n"
        "    assert 'example' in said.getvalue(), command\n"
        "slow = {'matplotlib', 'gradio', 'PIL', 'transformers', 'av'} & sys.modules.keys()\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("start", [["-m", "opensora_perflow"], ["bin/opensora-perflow"]])
def test_a_slow_command_says_something_before_torch_is_loaded(start, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "opensora-perflow").write_text("import opensora_perflow")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    for command, said in (("demo", "opensora-perflow demo: loading torch\n"), ("report", "")):
        done = subprocess.run(
            [sys.executable, *start, command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr, done.stdout) == (7, said, "")


def test_the_command_alone_shows_help_and_its_version(capsys):
    assert cli.main([]) == 0
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"opensora-perflow {__version__}"


@pytest.mark.parametrize(
    "options, iterations",
    [([], 100), (["--quick"], 24), (["--quick", "--iterations", "3"], 3), (["--quick", "--iterations", "100"], 100)],
)
def test_quick_changes_what_is_not_asked_for(options, iterations, monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "run", lambda settings: seen.append(settings) or (_ for _ in ()).throw(ValueError("seen")))
    assert cli.main(["demo", *options]) == 2
    assert seen[0].iterations == iterations and seen[0].num_samples == (8 if options else 32)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--teacher-iterations", "1000"], "here a teacher is there; name a checkout of 2.0 with --open-sora"),
        (["--videos", "mine", "--num-clips", "3"], "--videos takes yours; leave one of the two out"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run", lambda settings: pytest.fail("began"))
    assert cli.main(["demo", *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_reference_has_every_window_edge():
    times = compare.reference_times()
    assert times[0] == 1 and times[-1] == 0 and times == sorted(times, reverse=True)
    assert len(times) == sum(compare.REFERENCE) + 1 and set(compare.WINDOWS) <= set(times)


def test_stages_and_a_first_picture_are_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "opensora_perflow"):
        assert cli.main(["demo", "--out", str(tmp_path / "out"), *SMALL]) == 0
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("stage")]
    assert [line[:12] for line in told] == [f"stage {i} of 5" for i in range(1, 6)]
    first = [record.getMessage() for record in caplog.records if "first picture" in record.getMessage()]
    assert len(first) == 1 and first[0].endswith("frames.png")


@pytest.mark.parametrize("several, one, chosen", [(1.0, 1.5, 1), (1.0, 2.5, 4), (9.0, 1.0, 1)])
def test_threads_are_one_unless_more_are_twice_as_fast(several, one, chosen, monkeypatch):
    before, clock = torch.get_num_threads(), [0.0]

    def work():
        clock[0] += several if torch.get_num_threads() == 4 else one

    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])
    torch.set_num_threads(4)
    with threads.few_threads(work):
        assert torch.get_num_threads() == chosen
    assert torch.get_num_threads() == 4
    torch.set_num_threads(2)
    with threads.few_threads(lambda: pytest.fail("two threads need no trial")):
        assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
