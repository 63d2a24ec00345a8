"""CPU seconds of a training step, recipe by recipe in turns, and what few_step.py's trainings take beside each other.

    python benchmarks/step_cost.py [--world mixture video] [--rounds 20] [--seed 0]

The recipes of few_step.py. Every round trains one step of each, so that a busy machine slows all of them alike; counted are
CPU seconds of the process, on one thread. Columns: a step over the reference recipe's; the whole training, with its optimizer
steps, over the reference's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from few_step import make_world, set_up_process
from recipes import SCALES, Recipe, Scale, recipes
from tqdm import tqdm
from worlds import World


def stepper(recipe: Recipe, world: World, scale: Scale, seed: int) -> Callable[[], None]:
    """One training step of a fresh student."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = dict(watch=None, guidance=dict(mode="fixed", scale=world.guidance), **recipe.settings)
    student, scheduler = world.learner(recipe.width, config)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=scale.lr)

    def step() -> None:
        data, model_args = world.batch(scale.batch_size, generator)
        optimizer.zero_grad()
        scheduler.training_losses(student, data, model_args)["loss"].mean().backward()
        optimizer.step()

    return step


def measure(world: World, scale: Scale, rounds: int, seed: int) -> list[dict[str, Any]]:
    """One row a recipe."""
    chosen = recipes(world, scale.iterations)
    steppers = [stepper(recipe, world, scale, seed) for recipe in chosen]
    for step in steppers:
        step()  # makes the teacher
    seconds = [0.0] * len(steppers)
    for _ in tqdm(range(rounds), desc=world.name, unit="round"):
        for i, step in enumerate(steppers):
            began = time.process_time()
            step()
            seconds[i] += time.process_time() - began
    first, whole = seconds[0], seconds[0] * chosen[0].iterations
    return [
        {
            "recipe": recipe.name,
            "step": spent / rounds,
            "step_over_reference": spent / first,
            "steps": recipe.iterations,
            "training_over_reference": spent * recipe.iterations / whole,
        }
        for recipe, spent in zip(chosen, seconds)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", nargs="+", choices=("mixture", "video"), default=["mixture", "video"])
    parser.add_argument("--rounds", type=int, default=20, help="steps of each recipe that are counted (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_up_process()
    for name in args.world:
        world, scale = make_world(name, "cpu", None), SCALES["cpu"][name]
        print("| recipe | CPU seconds a step | over the reference's | optimizer steps | training over the reference's |")
        print("|---|---|---|---|---|")
        for row in measure(world, scale, args.rounds, args.seed):
            print(
                f"| {row['recipe']} | {row['step']:.3g} | {row['step_over_reference']:.2f} | {row['steps']} "
                f"| {row['training_over_reference']:.2f} |"
            )


if __name__ == "__main__":
    main()
