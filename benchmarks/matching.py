"""Students for 1 and 2 evaluations, with and without distribution matching beside the regression, at equal CPU seconds.

    python benchmarks/matching.py [--world mixture video] [--windows 1 2] [--seeds 0 1 2] [--weight W] [--out FOLDER]

Both train online by the scheduler's defaults. The student with matching takes STEPS; the one without gets as many steps as take
the same CPU seconds, by the cost of a few. Errors, energy distances (1/1000) and motion are those of the averaged weights
(EMA), at one step a window.

Writes matching.json and matching.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from few_step import EMA, SCALES, Evaluation, Recipe, make_world, set_up_process, train
from worlds import World

from opensora_perflow.atomic import replacing

STEPS = {"mixture": {1: 400, 2: 400}, "video": {1: 56, 2: 84}}
"""Of the student with matching, by its windows."""
RATE = {"mixture": 3.0, "video": 2.0}
"""Peak learning rate, over few_step.py's."""
SAMPLES = {"mixture": 2048, "video": 64}
REFERENCE_STEPS = {"mixture": 512, "video": 128}
"""Guided Euler steps to the endpoints that errors are measured from."""
WEIGHTS = {1: 0.5, 2: 0.2}
"""Of the matching, by the windows."""


TRIAL = 8
"""Steps by which the cost of one without matching is told."""


def seconds_a_step(curve: Sequence[Sequence[float]]) -> float:
    """Of a training's curve, without what comes before its first point."""
    return (curve[-1][2] - curve[0][2]) / (curve[-1][0] - curve[0][0])


def pair(name: str, windows: int, weight: float, evaluation: Evaluation, seed: int) -> list[dict[str, Any]]:
    """Rows of the two students of one seed."""
    world: World = evaluation.world
    scale = SCALES["cpu"][name]
    plain = Recipe("regression", dict(windows=windows), 0, steps=(windows,), lr_factor=RATE[name])
    settings = dict(windows=windows, matching=dict(weight=weight))
    matched = replace(plain, name="with matching", settings=settings, iterations=STEPS[name][windows])
    found = train(matched, world, seed, evaluation, scale)
    trial = train(replace(plain, iterations=TRIAL), world, seed, evaluation, scale)
    times_cheaper = seconds_a_step(found["curve"]) / seconds_a_step(trial["curve"])
    plain = replace(plain, iterations=round(matched.iterations * times_cheaper))
    rows = []
    for recipe, result in ((plain, train(plain, world, seed, evaluation, scale)), (matched, found)):
        (averaged,) = [row for row in result["rows"] if EMA in row["sampler"]]
        rows.append({"world": name, "windows": windows, "weight": weight, "seed": seed, "student": recipe.name, **averaged})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| world | NFE | student | steps | CPU seconds | error | energy distance | motion, or same mode |",
        "|---" * 8 + "|",
    ]
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["world"], row["windows"], row["student"]), []).append(row)
    for (world, windows, student), found in groups.items():

        def each(key: str, form: str, factor: float = 1.0, found: list[dict[str, Any]] = found) -> str:
            return ", ".join(format(factor * row[key], form) for row in found)

        own = "motion" if "motion" in found[0] else "same_mode"
        seconds = statistics.mean(row["train_seconds"] for row in found)
        cells = [each("optimizer_steps", "d", 1), f"{seconds:.0f}", each("endpoint_error", ".3f")]
        cells += [each("energy_distance", ".2f", 1000.0), each(own, ".0%")]
        lines.append(f"| {world} | {windows} | {student} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--windows", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weight", type=float, help=f"of the matching (default: {WEIGHTS} by the windows)")
    parser.add_argument("--out", type=Path, default=Path("outputs/matching"), help="folder (default outputs/matching)")
    args = parser.parse_args()
    set_up_process()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in args.world:
        world = make_world(name, "cpu", None)
        for seed in args.seeds:
            evaluation = Evaluation.of(world, SAMPLES[name], seed, floor=False, reference_steps=REFERENCE_STEPS[name])
            for windows in args.windows:
                rows += pair(name, windows, args.weight or WEIGHTS[windows], evaluation, seed)
                print(table(rows[-2:]).split("|\n", 2)[2], end="", flush=True)
                for file, text in (("matching.json", json.dumps(rows, indent=1)), ("matching.md", table(rows))):
                    with replacing(args.out / file) as path:
                        path.write_text(text)


if __name__ == "__main__":
    main()
