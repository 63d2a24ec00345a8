"""`opensora-perflow ui`: what its page shows, without gradio, and the page itself in a browser."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import BROWSER, REMEDY, Page

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.tools import cli, compare
from opensora_perflow.tools.studio import runs, show
from opensora_perflow.tools.studio.students import Studio, find_students, scheduler_of
from opensora_perflow.training.record import Record
from opensora_perflow.training.state import METADATA_KEY, StudentState, write_state
from opensora_perflow.worlds.model import TinySTDiT, load_teacher

STATE = StudentState(
    windows=compare.WINDOWS, transform=None, path="linear", prediction="velocity", guidance={"mode": "fixed", "scale": 3.0}
)


def write_student(path, network=None, state=STATE):
    write_state_dict(path, (network or load_teacher()).state_dict(), {"format": "pt", METADATA_KEY: state.to_json()})
    return path


@pytest.fixture(scope="module")
def studio():
    return Studio()


@pytest.fixture
def student(tmp_path):
    """The teacher's own weights, as a student that was told that guidance is in them."""
    return write_student(tmp_path / "student.safetensors")


@pytest.fixture(autouse=True)
def coarse_reference(monkeypatch):
    monkeypatch.setattr(compare, "REFERENCE", (1,) * 4)


def test_teacher_and_student_start_from_the_same_noise(studio, student):
    found = studio.compare(student, " A red circle  moving right", 4, 7)
    assert found.prompt == "a red circle moving right" and not found.notes
    assert [(one.name, one.nfe) for one in found.videos] == [
        ("teacher, 30 steps", 60), ("teacher, 4 steps", 8), ("student, 4 steps", 4)
    ]  # fmt: skip
    assert all(one.frames.shape == (17, 64, 64, 3) and one.seconds > 0 for one in found.videos)
    assert found.run.edges == list(compare.WINDOWS) and len(found.run.paths["student"][0]) == 5
    again = studio.compare(student, "a red circle moving right", 4, 7)
    assert [one.error for one in again.videos] == [one.error for one in found.videos]
    assert studio.compare(student, "a red circle moving right", 4, 8).videos[0].error != found.videos[0].error
    # An untrained student without guidance is the teacher without guidance, from the same noise.
    plain = write_student(student.parent / "plain.safetensors", state=replace(STATE, guidance={"mode": "fixed", "scale": 1.0}))
    teacher, own = studio.compare(plain, "a red circle moving right", 4, 7).videos[1:]
    assert teacher.nfe == own.nfe == 4
    text = show.comparison(found)
    assert text.count("<video") == 3 and text.count("<svg") == 3 and "NFE 60" in text


def test_what_a_user_should_know_is_said(studio, student):
    found = studio.compare(student, "<b>ein Hund</b>", 2, 0)
    assert any("2 sampling steps for 4 windows" in note for note in found.notes)
    assert any("does not know" in note for note in found.notes) and found.videos[0].as_described is None
    assert "<b>ein" not in show.comparison(found)


def test_windows_of_a_tiny_config_are_taken_to_flow_time():
    """Warp of Open-Sora 1.2 at 192 x 192 and 17 frames, 5 latent ones: r u / (1 + (r - 1) u) with r = 192 / 512 * sqrt(5)."""
    state = replace(STATE, windows=[1.0, 0.5, 0.0], transform={"formula": "v1.2", "scale": 1.0, "scale_temporal": True})
    scheduler, scale = scheduler_of(state, 2)
    r = 192 / 512 * 5**0.5
    assert scale == 3.0 and scheduler.windows.edges == pytest.approx([1, 0.5 * r / (1 + (r - 1) * 0.5), 0], rel=1e-6)  # float32


def test_a_student_that_is_guided_when_sampled_has_two_evaluations_a_step(studio, tmp_path):
    path = write_student(tmp_path / "sync.safetensors", state=replace(STATE, guidance={"mode": "sync"}, cfg_scale=2.0))
    videos = studio.compare(path, "a red circle moving right", 4, 0).videos
    assert [one.nfe for one in videos] == [60, 8, 8]
    assert videos[1].error != videos[2].error  # even steps and the windows' own


def test_checkpoints_of_demos_and_trainings_are_found_and_averages_taken(studio, tmp_path):
    write_student(tmp_path / "demo" / "student.safetensors")
    folder = tmp_path / "run" / "epoch0-global_step8"
    write_state_dict(folder / "model" / "model.safetensors", TinySTDiT().state_dict(), {"format": "pt"})
    write_state_dict(folder / "ema.safetensors", load_teacher().state_dict(), {"format": "pt"})
    write_state(folder, STATE)
    found = find_students([tmp_path / "demo", tmp_path / "run", tmp_path / "not there"])
    assert list(found.values()) == [tmp_path / "demo" / "student.safetensors", folder]
    first, second = (studio.compare(path, "a red circle moving right", 4, 0).videos[2] for path in found.values())
    assert first.error == second.error


@pytest.mark.parametrize(
    "prompt, steps, seed, message",
    [("", 4, 0, "a prompt"), ("a", 17, 0, "1 to 16 steps"), ("a", 0, 0, "steps"), ("a", 4, 10**23, "the seed must be at most")],
)
def test_what_cannot_be_sampled_is_refused(prompt, steps, seed, message, studio, student):
    with pytest.raises(ValueError, match=message):
        studio.compare(student, prompt, steps, seed)


def test_other_networks_are_refused(studio, tmp_path):
    with pytest.raises(ValueError, match="no student of the tiny model"):
        studio.compare(write_student(tmp_path / "small.safetensors", TinySTDiT(depth=1)), "a", 4, 0)
    write_state_dict(tmp_path / "unknown.safetensors", load_teacher().state_dict(), {"format": "pt"})
    with pytest.raises(ValueError, match="has no perflow.json"):
        studio.compare(tmp_path / "unknown.safetensors", "a", 4, 0)
    several = replace(STATE, guidance={"mode": "fixed", "scale": [3.0, 3.0, 2.0, 1.0]})
    with pytest.raises(ValueError, match="this student has several"):
        scheduler_of(several, 4)


def write_steps(folder, steps):
    record = Record(folder)
    record.write("begin", 0, format=1, version="0.1.0", windows=[1.0, 0.5, 0.0], recipe={}, state={})
    for step in steps:
        record.write("step", step, loss=0.5, window_loss=[0.5, 0.4])


def test_a_run_is_read_where_it_is_written_now(tmp_path):
    out = tmp_path / "out"
    assert runs.find_runs([out]) == {} and runs.read(out) is None and runs.stamp(out) == ()
    write_steps(out, range(2))
    before = runs.stamp(out)
    assert list(runs.find_runs([tmp_path])) == [str(out)] and len(runs.read(out).steps) == 2
    hidden = tmp_path / ".out.unfinished-abc"
    write_steps(hidden, range(5))
    os.utime(out / "record.jsonl", (0, 0))
    assert runs.newest(out) == hidden and len(runs.read(out).steps) == 5 and runs.stamp(out) != before
    assert runs.read(out).name == "out" and "Loss of each window" in show.run(runs.read(out))


def test_a_demo_is_started_told_of_and_ended(tmp_path):
    training = runs.Training(tmp_path / "out")
    assert training.told() == "" and not training.runs
    training.start(quick=True)
    until = time.monotonic() + 120
    while "stage" not in training.told() and time.monotonic() < until:
        time.sleep(0.2)
    assert training.told().startswith("stage 1 of 5") and training.runs
    training.stop()
    assert "stopped by Ctrl-C" in training.told() and not (tmp_path / "out").exists()


def test_a_bar_that_is_drawn_after_the_last_words_does_not_hide_them(tmp_path):
    training = runs.Training(tmp_path / "out")
    training._process = SimpleNamespace(poll=lambda: 130, returncode=130)
    training._log.write_text(
        "opensora-perflow demo: loading torch\nclips: 0%| |opensora-perflow: stopped by Ctrl-C\n\rclips: 0%| |\n"
    )
    assert training.told() == "Ended: opensora-perflow: stopped by Ctrl-C"


def test_without_gradio_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "opensora_perflow.tools.studio.layout", raising=False)
    assert cli.main(["ui"]) == 2
    assert "pip install 'opensora_perflow[ui]'" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_refused(tmp_path, capsys):
    assert cli.main(["ui", str(tmp_path / "none")]) == 2
    assert "where nothing is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "port, words", [("0", "an integer >= 1"), ("65536", "at most 65535"), (None, "Address already in use")]
)
def test_a_port_that_cannot_be_used_is_refused(port, words, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert cli.main(["ui", "--port", port or str(other.getsockname()[1])]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_that_has_nothing_to_show_is_told(tmp_path, monkeypatch, capsys):
    layout = SimpleNamespace(serve=lambda *arguments: None)
    monkeypatch.setitem(sys.modules, "opensora_perflow.tools.studio.layout", layout)
    write_steps(tmp_path / "run", range(2))
    (tmp_path / "empty").mkdir()
    assert cli.main(["ui", str(tmp_path / "run"), str(tmp_path / "empty")]) == 0
    said = capsys.readouterr().err
    assert f"{tmp_path / 'empty'} has no student and no run yet" in said and str(tmp_path / "run") not in said


SERVER = """
import sys
def tell(event, arguments):
    address = arguments[1] if event == "socket.connect" else None
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        print("connects to", address, flush=True)
sys.addaudithook(tell)
from opensora_perflow.tools.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def address(tmp_path):
    """Of a studio with an untrained student and a run of two steps; what it prints must be its address alone."""
    pytest.importorskip("gradio", reason="needs gradio; run `pip install -e '.[ui]'`")
    write_student(tmp_path / "student.safetensors")
    write_steps(tmp_path / "run", range(2))
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, "ui", "run", "student.safetensors"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    try:
        words = process.stdout.readline().split()
        assert words[:4] == ["the", "studio", "is", "at"], words
        yield words[4].rstrip(";")
    finally:
        process.terminate()
        assert process.communicate()[0] == ""


@pytest.mark.skipif(BROWSER is None, reason=REMEDY)
def test_a_browser_samples_watches_and_trains(address, tmp_path):
    page = Page(tmp_path)
    try:
        page.open(address)
        click = "document.querySelector('{}').click()"
        page.wait("document.querySelector('#sample') !== null")
        page.run(
            "const box = document.querySelector('#prompt textarea, #prompt input'); box.value = 'a blue square moving up';"
            "box.dispatchEvent(new Event('input', {bubbles: true}))"
        )
        page.run(
            "const steps = document.querySelector('#steps input[type=number]'); steps.value = 8;"
            "steps.dispatchEvent(new Event('input', {bubbles: true})); steps.dispatchEvent(new Event('blur'))"
        )
        page.run(click.format("#sample"))
        page.wait("[...document.querySelectorAll('#shown video')].filter(one => one.readyState > 1 && !one.paused).length == 3")
        text = page.run("document.querySelector('#shown').innerText")
        assert "a blue square moving up" in text and "student, 8 steps\nNFE 8" in text and "NFE 60" in text
        assert page.run("document.querySelectorAll('#shown svg').length") == 3
        for width in (400, 1400):
            page.resize(width)
            page.wait(f"innerWidth == {width}")
            assert page.run("document.documentElement.scrollWidth") <= width

        page.run("[...document.querySelectorAll('button[role=tab]')].find(one => one.innerText.includes('watch')).click()")
        page.wait("document.querySelector('#watched').innerText.includes('Loss of each window')")
        assert "The loss falls" not in page.run("document.querySelector('#watched').innerText")
        write_steps(tmp_path / "run", range(2, 40))  # the claim needs 20
        page.wait("document.querySelector('#watched').innerText.includes('The loss falls')")
        page.run(click.format("#train"))
        page.wait("document.querySelector('#told').innerText.includes('stage')", seconds=120)
        page.run(click.format("#stop"))
        page.wait("document.querySelector('#told').innerText.includes('stopped by Ctrl-C')")
        assert page.complaints == []
        assert [url for url in page.requests if not url.startswith((address, "data:"))] == []
    finally:
        page.close()
