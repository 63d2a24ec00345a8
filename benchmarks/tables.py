"""Tables and plots of few_step.py's results: all seeds' samples together, with bootstrap intervals."""

from __future__ import annotations

import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from measures import Estimate, energy_estimate, error_estimate
from worlds import World

from opensora_perflow.atomic import replacing
from opensora_perflow.tools.plots import save_figure


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per sampler and step count: mean and standard deviation over the seeds, and measures of all samples together.

    error, energy: Estimates. median: Of the samples' errors. seeds: Each seed's error and energy distance.
    """
    table: dict[tuple[str, int], list[dict[str, Any]]] = {}
    endpoints: dict[tuple[str, int], list[torch.Tensor]] = {}
    for result in results:
        for row in result["rows"]:
            table.setdefault((row["sampler"], row["steps"]), []).append(row)
            endpoints.setdefault((row["sampler"], row["steps"]), []).append(result["endpoints"])
    summary = []
    for key, rows in table.items():
        merged = {name: rows[0][name] for name in ("sampler", "steps", "nfe")}
        for name in rows[0].keys() - merged.keys() - {"x", "squared_errors", "shares"}:
            values = [row[name] for row in rows]
            merged[name] = statistics.mean(values)
            merged[name + "_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        squared = torch.cat([row["squared_errors"] for row in rows])
        merged["error"], merged["median"] = error_estimate(squared), squared.median().sqrt().item()
        merged["energy"] = energy_estimate(torch.cat([row["x"] for row in rows]), torch.cat(endpoints[key]))
        merged["seeds"] = [(row["endpoint_error"], row["energy_distance"]) for row in rows]
        summary.append(merged)
    return summary


def reaches(results: list[dict[str, Any]], first: str, second: str) -> dict[str, float] | None:
    """Where the second recipe's error first falls to the best of the first: shares of its calls, steps and seconds.

    Mean over the seeds; None if a seed never gets there, or a recipe is missing.
    """
    shares = []
    for result in results:
        if not {first, second} <= result["curves"].keys():
            return None
        best = min(result["curves"][first], key=lambda point: point[3])
        there = next((point for point in result["curves"][second] if point[3] <= best[3]), None)
        if there is None:
            return None
        shares.append([mine / theirs for mine, theirs in zip(there[:3], best[:3])])
    steps, calls, seconds = (statistics.mean(values) for values in zip(*shares))
    return {"optimizer_steps": steps, "teacher_calls": calls, "seconds": seconds}


def shown(estimate: Estimate, digits: int, unit: float = 1.0) -> str:
    return f"{estimate.value / unit:.{digits}f} ({estimate.low / unit:.{digits}f} to {estimate.high / unit:.{digits}f})"


def markdown(world: World, results: list[dict[str, Any]], summary: list[dict[str, Any]], command: str) -> str:
    """The table, as benchmarks/README.md shows it."""
    floors = ", ".join(f"{1000 * result['floor']:.2f}" for result in results)
    own, samples = world.own_column.replace("_", " "), sum(len(result["endpoints"]) for result in results)
    lines = [
        f"`{command}`",
        "",
        f"{samples} samples of the seeds {', '.join(str(result['seed']) for result in results)} together, with the 95 % "
        "intervals of 1,000 resamples. Energy distance in 1/1000"
        + ("." if "nan" in floors else f"; two independent sets of the teacher's samples are {floors} apart."),
        "",
        f"| sampler | NFE | endpoint error | each seed's | median | energy distance | each seed's | {own} | teacher calls "
        "| optimizer steps | CPU seconds |",
        "|---" * 11 + "|",
    ]
    for row in summary:
        cost = "| | | |"
        if "teacher_calls" in row:
            cost = f"| {row['teacher_calls']:.0f} | {row['optimizer_steps']:.0f} | {row['train_seconds']:.0f} |"
        errors = ", ".join(f"{error:.4f}" for error, _ in row["seeds"])
        energies = ", ".join(f"{1000 * energy:.2f}" for _, energy in row["seeds"])
        lines.append(
            f"| {row['sampler'].strip()}, {row['steps']} steps | {row['nfe']} | {shown(row['error'], 4)} | {errors} "
            f"| {row['median']:.4f} | {shown(row['energy'], 2, 1e-3)} | {energies} | {row[world.own_column]:.1%} {cost}"
        )
    names = list(results[0]["curves"])
    for name in names[1:]:
        if names[0] == "reference recipe" and (share := reaches(results, names[0], name)) is not None:
            lines += ["", f"The best error of the {names[0]} is reached by \"{name}\" with {share['teacher_calls']:.2f} of its "
                      f"teacher calls, {share['optimizer_steps']:.2f} of its optimizer steps, {share['seconds']:.2f} of its "
                      "CPU seconds."]  # fmt: skip
    return "\n".join(lines) + "\n"


def figure(results: list[dict[str, Any]], summary: list[dict[str, Any]], path: Path) -> None:
    """Error against NFE, and error while training against what the teacher was asked."""
    drawing = Figure(figsize=(15, 4.4), dpi=110, layout="constrained")
    left, right = drawing.subplots(1, 2)
    names = list(dict.fromkeys(row["sampler"] for row in summary))
    for i, name in enumerate(names):
        rows = [row for row in summary if row["sampler"] == name]
        nfe, error, spread = ([row[key] for row in rows] for key in ("nfe", "endpoint_error", "endpoint_error_std"))
        style = {"color": "#8a8a8a"} if i == 0 else {"color": f"C{(i - 1) % 10}", "linestyle": ("-", "--", ":")[(i - 1) // 10]}
        left.errorbar(nfe, error, spread, marker="o", capsize=3, label=name.strip(), **style)
        curve = results[0]["curves"].get(name, [])
        right.plot([point[1] for point in curve], [point[3] for point in curve], **style)
    left.set(xscale="log", yscale="log", xlabel="network evaluations a sample (NFE)", ylabel="endpoint error", title="Sampling")
    left.set_xticks([4, 8, 16, 32, 60], ["4", "8", "16", "32", "60"])
    left.minorticks_off()
    right.set(
        xscale="log", yscale="log", xlabel="teacher evaluations per sample of a batch", ylabel="error, one step a window",
        title=f"Training, seed {results[0]['seed']}",
    )  # fmt: skip
    drawing.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    save_figure(drawing, path)


def machine() -> dict[str, str]:
    """What ran a benchmark."""
    return {"torch": torch.__version__, "python": platform.python_version(), "processor": processor()}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def plain(value: Any) -> Any:
    """JSON of an estimate, or of what every sample has; nothing else is in a record."""
    return [round(one, 7) for one in value.tolist()] if isinstance(value, torch.Tensor) else vars(value)


def without_samples(result: dict[str, Any]) -> dict[str, Any]:
    """A seed's results but for the latents."""
    kept = {name: value for name, value in result.items() if name != "endpoints"}
    return {**kept, "rows": [{name: value for name, value in row.items() if name != "x"} for row in result["rows"]]}


def write(world: World, results: list[dict[str, Any]], out: Path, command: str) -> str:
    """Table, numbers and plot of a world; returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    summary = summarise(results)
    text = markdown(world, results, summary, command)
    record = {"command": command, **machine(), "summary": summary, "seeds": [without_samples(result) for result in results]}
    with replacing(out / f"{world.name}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1, default=plain))
    with replacing(out / f"{world.name}.md") as temporary:
        temporary.write_text(text)
    figure(results, summary, out / f"{world.name}.png")
    return text
