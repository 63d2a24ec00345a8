"""Put runs, charts and videos into the page's template."""

import base64
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from opensora_perflow import __version__
from opensora_perflow.atomic import replacing
from opensora_perflow.tools.page import charts
from opensora_perflow.tools.page.claims import claims
from opensora_perflow.tools.page.runs import RECORD, Run, read_run

FILE_NAME = "report.html"
SECTIONS = {
    "quality": (
        "Quality against evaluations",
        "Not measured. The command opensora-perflow curve, with --out RUN, compares a training's samplers.",
    ),
    "windows": ("Windows over the teacher's path", "Not measured: some window has no loss in the last fifth of the steps."),
    "training": ("Training", f"The run wrote no {RECORD}."),
}
"""Those made of charts, each with what stands there without one."""
GLOSSARY = {
    "Flow time t": "Runs from 1 (noise) to 0 (data). Sampling goes downwards.",
    "Velocity": "The network's answer: the direction from data to noise at a state and a time.",
    "Teacher": "The model to be distilled. It stays as it is.",
    "Student": "The network in training. It begins as the teacher, and learns to go with few steps.",
    "Window": "A stretch of time in which the student learns one straight line. Window 0 is the noisiest.",
    "NFE": "Network evaluations a sample. A guided step takes two, a step of a student with folded guidance one.",
    "Guidance": "Pushing the sample towards its prompt, by comparing the answers with and without the prompt.",
    "Endpoint error": "Root mean square distance of samples from the teacher's fine solution of the same noise.",
    "Energy distance": "A distance between two sets of samples. The expected value is 0 where both have one distribution.",
    "Motion": "Temporal-difference energy: the mean squared change from frame to frame.",
    "Held-out error": "The student's few steps against the teacher's end, on noise that is not trained on.",
    "One-step end": "Where a single step from a window's noisy edge leads.",
    "EMA": "A running average of the student's weights, which is often sampled instead.",
    "Standard error": "How far a mean would move with other samples. Differences within two of them decide nothing.",
}


def report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write a page about runs.

    Args:
        paths: Folders of runs, in the order of their columns.
        out: File; None: report.html in the folder of the only run, or in the current one.

    Returns:
        The file.

    Raises:
        ValueError: no run, one that cannot be read, or an `out` that is a folder.
    """
    runs = [read_run(path) for path in paths]
    if len({run.name for run in runs}) < len(runs):  # perflow_demo in two places
        runs = [replace(run, name=f"{path.resolve().parent.name}/{run.name}") for run, path in zip(runs, paths)]
    if out is None:
        folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else paths[0].parent if len(paths) == 1 else Path()
        out = folder / FILE_NAME
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file, such as {out / FILE_NAME}")
    write(runs, out)
    return out


def write(runs: Sequence[Run], out: Path) -> None:
    """Write the page, whole or not at all."""
    with replacing(out) as temporary:
        temporary.write_text(page(runs), encoding="utf-8")


def page(runs: Sequence[Run]) -> str:
    """The page as text. Everything that a run says is escaped; what the page needs is in it."""
    if not runs:
        raise ValueError("a report needs at least one run")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(short=_short, data_uri=lambda content: base64.b64encode(content).decode())
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    drawn = [(chart, charts.render(chart, runs)) for chart in charts.CHARTS]
    return template.render(
        runs=runs,
        version=__version__,
        sections=[(name, *texts, [one for one in drawn if one[0].name == name]) for name, texts in SECTIONS.items()],
        claims=[claims(run) for run in runs],
        columns=_columns(runs),
        tables={
            "Versions and seeds": _side_by_side([run.origins for run in runs]),
            "Settings": _side_by_side([run.settings for run in runs]),
        },
        glossary=GLOSSARY,
    )


def _columns(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Keys of the samplers' table that a run has, with their titles."""
    known = {
        "nfe": "NFE",
        "seconds_per_sample": "s / sample",
        "endpoint_error": "endpoint error",
        "energy_distance": "energy distance",
        "motion_energy": "motion",
        "as_described": "as described",
    }
    rows = [row for run in runs for row in run.samplers]
    return [(key, title) for key, title in known.items() if any(row.get(key) is not None for row in rows)]


def _side_by_side(columns: Sequence[dict[str, Any]]) -> list[tuple[str, list[Any], bool]]:
    """(name, value of each run, whether they differ), those that differ first."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, [column.get(name) for column in columns]) for name in names]
    return sorted(((name, values, any(v != values[0] for v in values)) for name, values in rows), key=lambda row: not row[2])


def _short(value: Any, key: str = "") -> str:
    """A value in a cell; shares as percentages."""
    if value is None:
        return "–"
    if key == "as_described":
        return f"{value:.0%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
