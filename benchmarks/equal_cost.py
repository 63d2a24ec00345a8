"""How often one solution of the teacher should be trained on, and how fine it should be, at equal CPU seconds.

    python benchmarks/equal_cost.py [--world mixture video] [--seeds 0 1 2] [--recipes NAME ...] [--steps 100] [--json out.json]

The scheduler's defaults train for half of few_step.py's steps, or --steps. Every other recipe gets as many steps as take the
same CPU seconds, by the cost of its first. Kept evaluations: what keeps activations in a step, times a solve x batch. Errors
are those of the averaged weights (EMA).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation import Evaluation
from few_step import set_up_process, train
from recipes import OURS, SCALES, Recipe, Scale, changed
from torch import Tensor
from worlds import MixtureWorld, VideoWorld, World

TRIAL = {"mixture": 100, "video": 24}
"""Steps by which a recipe's cost is told."""
WORLDS = {"mixture": MixtureWorld, "video": VideoWorld}


def candidates(scale: Scale) -> dict[str, tuple[dict[str, Any], int]]:
    """Settings and batch size by name; the first is what the others are compared with."""
    once = changed(OURS, draws=dict(per_solve=1))
    return {
        "2 times a solve": (OURS, scale.batch_size),
        "1 time": (once, scale.batch_size),
        "1 time, twice the batch": (once, 2 * scale.batch_size),
        "1 time, 4 midpoint steps": (changed(once, teacher=dict(steps_per_window=4)), scale.batch_size),
        "2 times, 4 midpoint steps": (changed(OURS, teacher=dict(steps_per_window=4)), scale.batch_size),
    }


def seconds_a_step(recipe: Recipe, world: World, seed: int, evaluation: Evaluation, scale: Scale) -> float:
    """CPU seconds, with the share of what a run costs before its first step."""
    trial = train(replace(recipe, iterations=TRIAL[world.name], steps=(4,)), world, seed, evaluation, scale)
    return trial["cost"]["train_seconds"] / TRIAL[world.name]


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row without its samples, of which JSON knows nothing."""
    return {name: value for name, value in row.items() if not isinstance(value, Tensor)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", nargs="+", choices=tuple(WORLDS), default=list(WORLDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", help="only those of these names; the first is run in any case")
    parser.add_argument("--steps", type=int, help="of the defaults (default: half of few_step.py's)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    set_up_process()
    rows: list[dict[str, Any]] = []
    print("| world | seed | recipe | kept evaluations | steps | CPU seconds | error, 4 steps | energy distance | 8 steps | |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in args.world:
        world, scale = WORLDS[name](), SCALES["cpu"][name]
        for seed in args.seeds:
            evaluation, allowed = Evaluation.of(world, scale.num_samples, seed, floor=False), None
            for recipe_name, (settings, batch_size) in candidates(scale).items():
                if args.recipes and allowed is not None and recipe_name not in args.recipes:
                    continue
                own = replace(scale, batch_size=batch_size)
                recipe = Recipe(recipe_name, settings, args.steps or scale.iterations // 2, steps=(4, 8))
                if allowed is not None:
                    steps = round(allowed / seconds_a_step(recipe, world, seed, evaluation, own))
                    recipe = replace(recipe, iterations=steps)
                result = train(recipe, world, seed, evaluation, own)
                allowed = allowed or result["cost"]["train_seconds"]
                four, eight = [row for row in result["rows"] if "EMA" in row["sampler"]]
                kept = batch_size * (settings.get("draws", {}).get("per_solve", 2))
                rows.append(
                    {
                        "world": name,
                        "seed": seed,
                        "recipe": recipe_name,
                        "kept": kept,
                        **result["cost"],
                        "rows": [plain(four), plain(eight)],
                    }
                )
                shown = [f"{row['endpoint_error']:.4f} | {1000 * row['energy_distance']:.2f}" for row in (four, eight)]
                cost_shown = f"{kept} | {result['cost']['optimizer_steps']} | {result['cost']['train_seconds']:.0f}"
                print(f"| {name} | {seed} | {recipe_name} | {cost_shown} | {' | '.join(shown)} |", flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
