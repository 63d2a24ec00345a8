"""Pictures of `opensora-perflow plan` and `curve`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opensora_perflow.planning.fine_path import uniform_grid
from opensora_perflow.planning.grids import Comparison
from opensora_perflow.tools.plots import STUDENT, TEACHER, save_figure


def grids_figure(found: dict[int, Comparison], path: Path) -> None:
    """Planned and uniform grids, and their errors, by their numbers of steps."""
    figure = Figure(figsize=(10, 1.6 + 0.7 * len(found)), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for place, (steps, row) in enumerate(found.items()):
        left.plot(uniform_grid(steps), [place + 0.14] * (steps + 1), "|-", color=TEACHER, markersize=14, linewidth=0.6)
        left.plot(row.grid, [place - 0.14] * (steps + 1), "|-", color=STUDENT, markersize=14, linewidth=0.6)
    left.set(
        xlim=(1.02, -0.02), ylim=(-0.5, len(found) - 0.5), xlabel="untransformed time (1 is noise)", title="Sampling times"
    )
    left.set_yticks(range(len(found)), [f"{steps} steps" for steps in found])
    places = range(len(found))
    right.barh([p + 0.18 for p in places], [row.uniform for row in found.values()], 0.32, color=TEACHER, label="uniform")
    right.barh([p - 0.18 for p in places], [row.error for row in found.values()], 0.32, color=STUDENT, label="planned")
    right.set(ylim=left.get_ylim(), yticks=[], xlabel="endpoint error", title="On fresh noise")
    right.legend(frameon=False)
    save_figure(figure, path)


def windows_figure(windows: dict[str, tuple[Sequence[float], Sequence[float]]], path: Path) -> None:
    """Edges and errors of windows, by their names."""
    figure = Figure(figsize=(8, 3.2), dpi=110, layout="constrained")
    axis = figure.subplots()
    for (name, (edges, errors)), color in zip(windows.items(), (TEACHER, STUDENT)):
        axis.stairs(errors[::-1], edges[::-1], color=color, label=f"{name} windows", linewidth=2)
    axis.set(xlim=(1, 0), xlabel="untransformed time (1 is noise)", ylabel="error of a window", title="Windows")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    save_figure(figure, path)


def curve_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Errors against evaluations; rows as in curve.json."""
    figure = Figure(figsize=(10, 3.6), dpi=110, layout="constrained")
    columns = (("endpoint error", "error", "planned"), ("energy distance", "energy_distance", "planned_energy"))
    for axis, (name, default, planned) in zip(figure.subplots(1, 2), columns):
        axis.plot([row["nfe"] for row in rows], [row[default] for row in rows], "o-", color=TEACHER, label="default grid")
        shown = [row for row in rows if planned in row]
        if shown:
            axis.plot([row["nfe"] for row in shown], [row[planned] for row in shown], "o-", color=STUDENT, label="planned grid")
        axis.set(xlabel="network evaluations a sample (NFE)", title=name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(bottom=min(0, *axis.get_ylim()))
        axis.legend(frameon=False)
    save_figure(figure, path)
