"""Fewer windows stage by stage against one window from the start, on the mixture of benchmarks/few_step.py.

    python benchmarks/curriculum.py [--iterations 1000] [--seeds 0 1 2] [--out FOLDER]

All students end with one window (K = 1, InstaFlow) and are trained with the scheduler's defaults, so that the original teacher
takes 8 guided midpoint steps from noise to data everywhere: one in each of 8 windows, eight in one. "previous": every stage's
student teaches the next one, unguided, with one Euler step a window. Columns: endpoint error as in few_step.py with 1, 2 and 4
uniform steps; teacher calls = evaluations of teachers, per sample of a batch, held-out measurements included. The json has
the lines of every stage's end.

Writes curriculum.json and curriculum.md after every student.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import torch
from evaluation import Evaluation, teacher_evaluations
from few_step import train
from recipes import Recipe
from smooth_windows import SCALE, WIDTH, cell, sampler
from worlds import MixtureWorld

from opensora_perflow.atomic import replacing
from opensora_perflow.method.metrics import endpoint_error
from opensora_perflow.worlds.mixture import MixtureNetwork

STEPS = (1, 2, 4)
DIRECT = dict(windows=1)
DIRECT_CALLS = 2 * 2 * 8  # per step of the optimizer: 8 midpoint steps, guided


def staged(teacher: str, iterations: int) -> dict[str, Any]:
    advance = dict(min_steps=iterations // 10, max_steps=iterations // 5)
    return dict(
        windows=8,
        curriculum=dict(windows=[8, 4, 2, 1], teacher=teacher, advance=advance),
    )


class StageLog(logging.Handler):
    """Keeps the curriculum's lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "curriculum" in record.getMessage():
            self.lines.append(record.getMessage())


def measure(name: str, settings: dict[str, Any], iterations: int, seed: int, evaluation: Evaluation) -> dict[str, Any]:
    log = StageLog()
    logging.getLogger("opensora_perflow").addHandler(log)
    with teacher_evaluations(MixtureNetwork) as samples:
        result = train(Recipe(name, settings, iterations, WIDTH, steps=()), evaluation.world, seed, evaluation, SCALE)
    logging.getLogger("opensora_perflow").removeHandler(log)
    curriculum = result["scheduler"].curriculum
    assert curriculum is None or curriculum.is_last, "the run ended before the last stage"
    student = result["student"]
    errors = {
        steps: endpoint_error(evaluation.sample(sampler("uniform", steps, 1), student), evaluation.endpoints) for steps in STEPS
    }
    cost = {"teacher_calls": samples[0] / SCALE.batch_size, "optimizer_steps": iterations}
    return {"name": name, "seed": seed, **cost, "errors": errors, "stages": log.lines}


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        f"`{command}`", "",
        "| student | seeds | optimizer steps | teacher calls | " + " | ".join(f"N = {steps}" for steps in STEPS) + " |",
        "|---" * (4 + len(STEPS)) + "|",
    ]  # fmt: skip
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        cells = [cell([row["errors"][steps] for row in mine]) for steps in STEPS]
        means = [f"{statistics.mean(row[key] for row in mine):.0f}" for key in ("optimizer_steps", "teacher_calls")]
        lines.append(f"| {name} | {len(mine)} | " + " | ".join(means + cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/curriculum"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small: more threads wait for each other
    logging.getLogger("opensora_perflow").setLevel(logging.INFO)
    command = f"python benchmarks/curriculum.py --iterations {args.iterations}"
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        rows.append(row)
        print(json.dumps(row), flush=True)
        with replacing(args.out / "curriculum.json") as path:
            path.write_text(json.dumps({"command": command, "rows": rows}, indent=1))
        with replacing(args.out / "curriculum.md") as path:
            path.write_text(markdown(rows, command))
        return row

    for seed in args.seeds:
        evaluation = Evaluation.of(MixtureWorld(), SCALE.num_samples, seed, floor=False)
        for teacher in ("original", "previous"):
            name = f"8 -> 4 -> 2 -> 1, {teacher} teacher"
            calls = keep(measure(name, staged(teacher, args.iterations), args.iterations, seed, evaluation))["teacher_calls"]
            fewer = max(1, round(calls / DIRECT_CALLS))
            keep(measure(f"K = 1, the teacher calls of {teacher!r}", DIRECT, fewer, seed, evaluation))
        keep(measure("K = 1, as many optimizer steps", DIRECT, args.iterations, seed, evaluation))
    print(markdown(rows, command))


if __name__ == "__main__":
    main()
