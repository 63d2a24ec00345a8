"""`opensora-perflow report`: what the page says, that it is whole in itself, and that a browser shows it."""

import json
import os
import re
import shutil
import subprocess

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from opensora_perflow.tools import cli
from opensora_perflow.tools.page import charts
from opensora_perflow.tools.page.claims import claims
from opensora_perflow.tools.page.render import page, report
from opensora_perflow.tools.page.runs import Run, read_run
from opensora_perflow.training.record import Record
from opensora_perflow.worlds.videos import write_video

EDGES = [1.0, 0.75, 0.5, 0.25, 0.0]
ROWS = [
    ("teacher, 36 midpoint steps", 144, 0.0, 0.0),
    ("teacher, 30 steps", 60, 0.2, 0.0001),
    ("teacher, 4 steps", 8, 0.9, 0.0125),
    ("student, 4 steps", 4, 0.7, 0.003),
    ("its last step's weights", 4, 0.8, 0.004),
]


def result(share=0.5):
    return {
        "settings": {"seed": 3, "out": "perflow_demo", "videos": None},
        "samplers": [{"sampler": name, "nfe": nfe, "endpoint_error": error, "energy_distance": energy, "as_described": 1.0}
                     for name, nfe, error, energy in ROWS],
        "windows": [{"t_start": a, "t_end": b, "teacher": 0.2, "student": 0.1,
                     "motion": {"teacher": 2.0, "student": 2.0 * (share if k == 0 else 1), "error": 0.1}}
                    for k, (a, b) in enumerate(zip(EDGES, EDGES[1:]))],
        "loss": {"first": 0.6, "last": 0.2},
        "seconds": 200.0,
    }  # fmt: skip


@pytest.fixture
def demo(tmp_path):
    folder = tmp_path / "perflow_demo"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(result()))
    write_video(folder / "side_by_side.mp4", np.random.default_rng(0).integers(0, 255, (8, 64, 128, 3), np.uint8), fps=8)
    return folder


@pytest.fixture
def training(tmp_path):
    """40 steps whose losses halve, a breach, a rollback of 10 steps, and held-out errors."""
    folder = tmp_path / "000-run"
    record = Record(folder)
    record.write("begin", 0, format=1, version="0.1.0", windows=EDGES, recipe={"draws": {"edge_mass": 0.75}}, state={})
    for step in [*range(25), *range(15, 40)]:
        losses = [None] * 4
        losses[step % 4] = 0.5 ** (step / 10)
        record.write("step", step, time=1.0 * step, loss=losses[step % 4], window_loss=losses, window_spread=losses,
                     window_motion=losses, update=0.001, ema_update=1e-5)  # fmt: skip
        if step % 10 == 0:
            record.write("held_out", step, error=0.9 - 0.01 * step, error_se=0.01, untrained=0.9, untrained_se=0.01)
    record.write("breach", 24, cause="learning rate", window=2, text="<b>steps grew</b>", policy="rollback")
    record.write("rollback", 24, to=15)
    (folder / "epoch0-global_step40").mkdir()
    (folder / "epoch0-global_step40" / "perflow.json").write_text(json.dumps({"windows": EDGES, "draws": {"seed": 11}}))
    (folder / "config.txt").write_text(json.dumps({"seed": 42, "model": {"type": "STDiT3-XL/2"}}))
    return folder


def test_a_page_of_each_kind_and_of_both(demo, training, tmp_path, monkeypatch, capsys):
    assert cli.main(["report", str(demo)]) == 0
    assert str(demo / "report.html") in capsys.readouterr().out
    text = (demo / "report.html").read_text()
    assert "Energy distance" in text and '<td class="n">100%</td>' in text and 'src="data:video/mp4;base64,AAAA' in text
    assert "The run wrote no record" in text
    assert cli.main(["report", str(training / "record.jsonl")]) == 0
    text = (training / "report.html").read_text()
    assert "Loss of each window" in text and "back to step 15" in text and "in window 2" in text
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(demo), str(training)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("<h3>000-run</h3>") > 5 and "Not recorded." in text


def test_a_page_is_whole_in_itself(demo, training):
    text = page([read_run(demo), read_run(training)])
    for address in re.findall(r'(?:src|href|data|action)="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text):
        assert address.startswith(("#", "data:")), address
    assert "@import" not in text and "<script" not in text and "default-src 'none'" in text


def test_what_a_run_says_is_escaped(training):
    text = page([read_run(training, "<script>alert(1)</script>")])
    assert "<script>" not in text and "&lt;b&gt;steps grew" in text


def test_a_step_taken_twice_counts_once(training):
    run = read_run(training)
    assert [line["step"] for line in run.steps] == list(range(40))
    assert run.history[10] == pytest.approx(0.5, abs=1e-6)  # the record keeps 6 digits
    assert run.origins["training steps"] == 40 and run.origins["seed of the draws"] == 11
    assert run.origins["seed of the run"] == 42 and run.origins["network"] == "STDiT3-XL/2"
    assert run.settings["perflow.draws.edge_mass"] == 0.75 and run.settings["config.model.type"] == "STDiT3-XL/2"


def test_claims_are_compared_with_what_was_measured(demo, training):
    said = {claim.text: claim for claim in claims(read_run(demo))}
    assert said["One evaluation a window"].holds and said["One evaluation a window"].measured == "4"
    nearer = said["Nearer to the teacher's distribution than the teacher with twice the evaluations"]
    assert nearer.holds and (nearer.expected, nearer.measured) == ("below 0.0125", "0.003")
    assert said["Moves as the teacher does"].holds is False
    assert said["Moves as the teacher does"].measured == "50%, 100%, 100%, 100%"
    said = {claim.text: claim.holds for claim in claims(read_run(training))}
    assert said == {"The loss falls": True, "Nearer to the teacher's end than an untrained student": True,
                    "No alarm of the guard": False}  # fmt: skip


def test_a_difference_within_the_noise_decides_nothing():
    line = {"kind": "held_out", "step": 10, "error": 0.89, "error_se": 0.01, "untrained": 0.9, "untrained_se": 0.01}
    (claim,) = claims(Run("a", record=[line]))  # 0.01 apart; two standard errors of the difference are 0.028
    assert claim.holds is None


def test_charts_of_runs_share_their_axes(demo):
    runs = [Run("a", result=result()), Run("b", result=result(share=3.0))]
    (chart,) = [chart for chart in charts.CHARTS if chart.draw is charts.motion]
    drawn = charts.render(chart, runs)
    ticks = [re.findall(r">(\d\.\d)<", text) for text in drawn]
    assert ticks[0] == ticks[1] and "3.0" in ticks[0]  # 300 % of the other run
    assert charts.render(chart, [Run("empty")]) == [""]


def test_time_runs_from_noise_to_data():
    (chart,) = [chart for chart in charts.CHARTS if chart.draw is charts.windows]
    (text,) = charts.render(chart, [Run("a", result=result())])
    assert [label for label in re.findall(r">([\d.]+)<", text) if float(label) in EDGES][:5] == [
        "1",
        "0.75",
        "0.5",
        "0.25",
        "0",
    ]


def test_paths_are_coloured_by_window_and_meet_at_edges():
    """A path of three fine steps through two windows; the edge between them belongs to both colours."""
    paths = {
        "times": [1.0, 0.75, 0.5, 0.0],
        "teacher": [[[0, 0], [0.2, 0.1], [0.5, 0.3], [1, 0]]],
        "student": [[[0, 0], [0.9, 0.1]]],
    }
    windows = [{"t_start": a, "t_end": b, "teacher": 0.2, "student": 0.1} for a, b in ((1.0, 0.5), (0.5, 0.0))]
    axis = Figure().subplots()
    assert charts.trajectories(axis, Run("a", result={"windows": windows, "paths": paths}))
    _, first, second, student = axis.lines
    assert first.get_xdata().tolist() == [0, 0.2, 0.5] and second.get_xdata().tolist() == [0.5, 1]
    assert student.get_xydata().tolist() == [[0, 0], [0.9, 0.1]]
    assert not charts.trajectories(axis, Run("a", result={"windows": windows}))


def test_a_chart_is_the_same_twice_and_leaves_matplotlib_alone(training):
    before = matplotlib.rcParams["svg.fonttype"]
    run = read_run(training)
    for chart in charts.CHARTS:
        assert charts.render(chart, [run]) == charts.render(chart, [run])
    assert matplotlib.rcParams["svg.fonttype"] == before


def test_a_long_series_is_thinned_to_means():
    places, means = charts._smooth(np.arange(10_000.0))
    assert len(places) <= 500
    np.testing.assert_allclose(means, places - 24.5)  # the mean of 50 neighbours ends 24.5 behind their last


def test_a_curve_is_quality_against_evaluations(tmp_path):
    rows = [{"steps": n, "nfe": n, "error": 1 / n, "energy_distance": 0.1 / n} for n in (1, 2, 4)]
    (tmp_path / "curve.json").write_text(json.dumps({"model": "m", "rows": rows, "grids": [[1.0, 0.5, 0.0]]}))
    run = read_run(tmp_path)
    assert [row["sampler"] for row in run.result["samplers"]] == ["student, 1 steps", "student, 2 steps", "student, 4 steps"]
    assert charts.render(charts.CHARTS[0], [run]) != [""]


def test_a_run_that_has_written_nothing_is_no_page(tmp_path):
    (tmp_path / "record.jsonl").touch()
    with pytest.raises(ValueError, match=r"has nothing to report yet: its record\.jsonl has no line"):
        read_run(tmp_path)


def test_runs_of_one_name_are_told_by_their_folders(demo, tmp_path):
    other = shutil.copytree(demo, tmp_path / "other" / demo.name)
    out = report([demo, other], tmp_path / "both.html")
    assert f"{tmp_path.name}/perflow_demo and other/perflow_demo" in out.read_text()


def test_large_and_many_videos_are_left_out(demo, monkeypatch):
    monkeypatch.setattr("opensora_perflow.tools.page.runs.MOST_BYTES", 10)
    run = read_run(demo)
    assert run.videos == {} and run.left_out == ("side_by_side.mp4",)


@pytest.mark.parametrize("content, message", [(None, "has none of these files"), ("{", "is no JSON")])
def test_no_run_is_refused(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_a_folder_is_no_file_to_write(demo, tmp_path, capsys):
    assert cli.main(["report", str(demo), "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<script>addEventListener("load", () => { const root = document.documentElement; parent.postMessage([innerWidth,
root.scrollWidth, Math.min(...[...document.querySelectorAll("svg text")].map(one => one.getBoundingClientRect().height)),
[...document.querySelectorAll("video")].every(one => one.readyState > 0)], "*") })</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium; run `apt-get install chromium`")
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_shows_it_without_an_error_or_a_request(width, demo, training, tmp_path):
    """The page allows no request, so that each attempt is an error on the console. Nothing is wider than the window."""
    text = page([read_run(demo), read_run(training)])
    (tmp_path / "page.html").write_text(text)
    measured = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';").replace(
        "</body>", MEASURE
    )
    (tmp_path / "measured.html").write_text(measured)
    frame = f'<iframe src="measured.html" style="width:{width}px;height:900px;border:0"></iframe>'
    listen = '<script>onmessage = event => document.body.append("measured " + JSON.stringify(event.data))</script>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{listen}{frame}</body>")

    def show(name):
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1500,1000",
                   "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
                   (tmp_path / name).as_uri()]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)})
        assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout

    assert "Claims against measured" in show("page.html")
    inner, wide, text_height, plays = json.loads(re.search(r"measured (\[.*?\])", show("frame.html"))[1])
    assert inner == width and wide <= width
    assert text_height >= 8 and plays  # pixels of the smallest letters
