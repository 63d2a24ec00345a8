"""The report's charts as SVG: each draws one run, and the runs of a page share their axes."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from opensora_perflow.tools.page.runs import Run
from opensora_perflow.tools.plots import STUDENT, TEACHER

SIZE = (4.6, 3.0)
"""Inches; text stays readable where a page shows a chart on a phone."""
COLORS = ("#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#7a4ea3", "#0e7c7b", "#8c564b", "#555555")
"""Of windows, the noisiest first."""


@dataclass(frozen=True)
class Chart:
    """name: Of the section that the chart is in. text: How to read it. draw: Returns False where a run has no data."""

    name: str
    title: str
    text: str
    draw: Callable[[Axes, Run], bool]


def render(chart: Chart, runs: Sequence[Run]) -> list[str]:
    """The chart of each run as an SVG element, with the same limits; "" for a run without the data."""
    figures = [Figure(figsize=SIZE, layout="constrained") for _ in runs]
    axes = [figure.subplots() for figure in figures]
    drawn = [chart.draw(axis, run) for axis, run in zip(axes, runs)]
    known = [axis for axis, has in zip(axes, drawn) if has]
    for low_high, take in (("get_ylim", "set_ylim"), ("get_xlim", "set_xlim")):
        limits = [getattr(axis, low_high)() for axis in known]
        for axis in known:
            turned = limits[0][0] > limits[0][1]
            ends = min(min(pair) for pair in limits), max(max(pair) for pair in limits)
            getattr(axis, take)(*(ends[::-1] if turned else ends))
    return [_svg(figure, f"{chart.title} {number}") if has else "" for number, (figure, has) in enumerate(zip(figures, drawn))]


def _svg(figure: Figure, salt: str) -> str:
    (axis,) = figure.axes
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1)


def _smooth(values: Sequence[float], most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """(places, running means) of a series, at most so many."""
    width = max(1, min(50, len(values) // 12))
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    places = np.arange(width - 1, len(values))
    every = max(1, len(means) // most)
    return places[::every], means[::every]


def _plain_log(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _legend(axis: Axes, columns: int = 2) -> None:
    """Below the chart, where no line is."""
    axis.legend(frameon=False, fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)


def _mark_events(axis: Axes, run: Run) -> None:
    for kind, style in (("breach", ":"), ("rollback", "-."), ("stage", "--")):
        for line in run.lines(kind):
            axis.axvline(line["step"], color="#333333", linestyle=style, linewidth=0.9)


def loss(axis: Axes, run: Run) -> bool:
    """The loss of each step, and its running mean."""
    if not run.history:
        return False
    steps = [line["step"] for line in run.steps if line.get("loss") is not None] or list(range(len(run.history)))
    axis.plot(steps, run.history, color=STUDENT, alpha=0.25, linewidth=0.8)
    places, means = _smooth(run.history)
    axis.plot(np.asarray(steps)[places], means, color=STUDENT)
    _mark_events(axis, run)
    axis.set(xlabel="training step", ylabel="loss")
    _plain_log(axis)
    return True


def _by_window(key: str, label: str, level: float | None = None, log: bool = False) -> Callable[[Axes, Run], bool]:
    """A chart of a list that each step gives, one number a window."""

    def draw(axis: Axes, run: Run) -> bool:
        lists = [(line["step"], line[key]) for line in run.steps if isinstance(line.get(key), list)]
        count = max((len(values) for _, values in lists), default=0)
        for k in range(count):
            points = [(step, values[k]) for step, values in lists if k < len(values) and values[k] is not None]
            if points:
                steps, values = np.array(points).T
                places, means = _smooth(values)
                name = f"{run.edges[k]:.3g} to {run.edges[k + 1]:.3g}" if k + 1 < len(run.edges) else str(k)
                axis.plot(steps[places], means, color=COLORS[k % len(COLORS)], label=f"window {name}", linewidth=1.3)
        if not axis.lines:
            return False
        if level is not None:
            axis.axhline(level, color=TEACHER, linewidth=0.9)
        _mark_events(axis, run)
        axis.set(xlabel="training step", ylabel=label)
        if log:
            _plain_log(axis)
        _legend(axis)
        return True

    return draw


def held_out(axis: Axes, run: Run) -> bool:
    """Error on held-out noise with its standard error, beside an untrained network's."""
    rows = [line for line in run.lines("held_out") if line.get("error") is not None]
    if not rows:
        return False
    steps = [line["step"] for line in rows]
    for key, color, label in (("untrained", TEACHER, "untrained"), ("error", STUDENT, "student")):
        values = np.array([line.get(key) if line.get(key) is not None else np.nan for line in rows], dtype=float)
        spread = np.array([line.get(f"{key}_se") or 0.0 for line in rows], dtype=float)
        axis.fill_between(steps, values - spread, values + spread, color=color, alpha=0.2, linewidth=0)
        axis.plot(steps, values, color=color, marker="o", markersize=3, label=label)
    _mark_events(axis, run)
    axis.set(xlabel="training step", ylabel="held-out error")
    axis.set_xlim(min(steps) - 1, max(steps) + 1)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(bottom=0)
    _legend(axis)
    return True


def _quality(key: str, label: str) -> Callable[[Axes, Run], bool]:
    """A chart of a column of the samplers' table over evaluations; the reference, whose error is 0, is left out."""

    def draw(axis: Axes, run: Run) -> bool:
        rows = [row for row in run.samplers if row.get(key) is not None and row.get("endpoint_error") != 0]
        if not rows:
            return False
        for who, color, marker in (("teacher", TEACHER, "s"), ("student", STUDENT, "o")):
            points = sorted((row["nfe"], row[key]) for row in rows if row["sampler"].startswith(who))
            if points:
                axis.plot(*zip(*points), color=color, marker=marker, label=who)
        for row, marker in zip((row for row in rows if not row["sampler"].startswith(("teacher", "student"))), "D^vPX*"):
            axis.plot(row["nfe"], row[key], marker, color=STUDENT, fillstyle="none", linestyle="none", label=row["sampler"])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set(xlabel="network evaluations a sample (NFE)", ylabel=label)
        axis.set_ylim(bottom=min(0.0, *(row[key] for row in rows)))
        _legend(axis)
        return True

    return draw


def windows(axis: Axes, run: Run) -> bool:
    """Error of one step across each window, at its place in time, which runs from noise on the left to data.

    Where no teacher's step was measured, the loss of each window in the last fifth of a training.
    """
    rows = run.windows
    pairs = list(zip(run.edges, run.edges[1:]))
    bars = {name: [row[name] for row in rows] for name in ("teacher", "student")} if rows else {"student": _last_losses(run)}
    if not pairs or not all(bars.values()):
        return False
    for k, (t_start, t_end) in enumerate(pairs):
        axis.axvspan(t_end, t_start, color="#4c72b0", alpha=0.10 if k % 2 else 0.03, linewidth=0)
    for place, (name, heights) in enumerate(bars.items()):
        centres = [
            (t_start + t_end) / 2 + (len(bars) - 1) * (0.5 - place) * 0.4 * (t_start - t_end) for t_start, t_end in pairs
        ]
        widths = [0.36 * (t_start - t_end) for t_start, t_end in pairs]
        color = TEACHER if name == "teacher" else STUDENT
        axis.bar(centres, heights, widths, color=color, label=f"{name}, one step" if rows else "last fifth of the steps")
    axis.set(xlim=(1, 0), xlabel="time: noise (1) to data (0)", ylabel="error at the window's end" if rows else "loss")
    axis.set_xticks(run.edges, [f"{edge:.3g}" for edge in run.edges])
    _legend(axis)
    return True


def trajectories(axis: Axes, run: Run) -> bool:
    """The teacher's fine path, a colour a window, and the student's steps, each sample in a plane of its own and in a row."""
    paths = run.paths
    if not paths or len(run.edges) < 2:
        return False
    times, edges = np.array(paths["times"]), run.edges
    pairs = [(np.array(teacher), np.array(student)) for teacher, student in zip(paths["teacher"], paths["student"])]
    heights = np.concatenate([np.concatenate(pair)[:, 1] for pair in pairs])
    room = 1.15 * (heights.max() - heights.min())
    for row, (teacher, student) in enumerate(pairs):
        down = np.array([0.0, -row * room])
        axis.plot([0, 1], [down[1]] * 2, color="#bbbbbb", linewidth=0.8, linestyle=":")
        for k, (t_start, t_end) in enumerate(zip(edges, edges[1:])):
            inside = (times <= t_start) & (times >= t_end)
            label = f"window {t_start:.3g} to {t_end:.3g}" if row == 0 else None
            axis.plot(*(teacher[inside] + down).T, color=COLORS[k % len(COLORS)], linewidth=3, alpha=0.75, label=label)
        label = "student's steps" if row == 0 else None
        axis.plot(*(student + down).T, color="black", linewidth=1, marker="o", markersize=3, label=label)
    axis.set(xlabel="from noise (0) to the teacher's end (1)", ylabel="across, the same units")
    axis.set_yticks([])
    _legend(axis)
    return True


def _last_losses(run: Run) -> list[float]:
    """The mean loss of each window in the last fifth of the steps; empty unless each window was met there."""
    lists = [line["window_loss"] for line in run.steps[-max(1, len(run.steps) // 5) :] if line.get("window_loss")]
    columns = [[value for value in column if value is not None] for column in zip(*lists)]
    known = len(columns) == len(run.edges) - 1 and all(columns)
    return [float(np.mean(column)) for column in columns] if known else []


def motion(axis: Axes, run: Run) -> bool:
    """The student's motion in each window, in parts of the teacher's."""
    shares, rows = run.motion_shares, run.windows
    if not shares:
        return False
    bars = axis.bar(range(len(rows)), shares, 0.6, color=STUDENT)
    axis.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=9, label_type="center", color="white")
    axis.axhline(1, color=TEACHER)
    axis.set_xticks(range(len(rows)), [f"{row['t_start']:.3g} to\n{row['t_end']:.3g}" for row in rows])
    axis.set(xlabel="window", ylabel="motion / teacher's")
    axis.set_ylim(0, max(1.15, 1.1 * max(shares)))
    return True


def sizes_of_updates(axis: Axes, run: Run) -> bool:
    """Length of each update in parts of the weights', of the network and of its average."""
    for key, color, label in (("update", STUDENT, "network"), ("ema_update", TEACHER, "average (EMA)")):
        points = [(line["step"], line[key]) for line in run.steps if line.get(key)]
        if points:
            steps, values = np.array(points).T
            places, means = _smooth(values)
            axis.plot(steps[places], means, color=color, label=label)
    if not axis.lines:
        return False
    _mark_events(axis, run)
    axis.set(xlabel="training step", ylabel="update / weights")
    axis.set_yscale("log")
    _legend(axis)
    return True


CHARTS = (
    Chart("quality", "Endpoint error", "Distance to the teacher's end from the same noise. Lower is better, left is cheaper.",
          _quality("endpoint_error", "endpoint error")),
    Chart("quality", "Energy distance", "Distance between the distributions, near 0 where both are the same.",
          _quality("energy_distance", "energy distance")),
    Chart("windows", "Windows over the teacher's path", "Coloured: the teacher's fine path of each sample, in the plane where "
          "the path bends most. Black: the student's steps. Where the colour is straight, one step is enough.", trajectories),
    Chart("windows", "One step across each window", "The teacher's bar is how far its path bends in the window. "
          "A useful student's bar is lower.", windows),
    Chart("windows", "Motion in each window", "100 % moves as the teacher. Far less is a video that stands still.", motion),
    Chart("training", "Loss", "Thin: each step. Thick: running mean.", loss),
    Chart("training", "Loss of each window", "Running means. A window that stays high is learned worst.",
          _by_window("window_loss", "loss", log=True)),
    Chart("training", "Held-out error", "Few steps of the student against the teacher's end, on noise that is not trained on. "
          "Shaded: standard error.", held_out),
    Chart("training", "Spread of one-step ends", "1 is the teacher's spread. Towards 0 the student collapses to one picture.",
          _by_window("window_spread", "spread / teacher's", level=1)),
    Chart("training", "Motion of one-step ends", "1 is the teacher's motion.",
          _by_window("window_motion", "motion / teacher's", level=1)),
    Chart("training", "Size of updates", "A jump is a learning rate that is too high. An average at 0 does not move.",
          sizes_of_updates),
)  # fmt: skip
"""In the page's order."""
