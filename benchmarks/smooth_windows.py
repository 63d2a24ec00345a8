"""Steps across window edges: which students take them, on the mixture of benchmarks/few_step.py.

    python benchmarks/smooth_windows.py [--iterations 1000] [--seeds 0 1 2] [--recipes NAME ...] [--out FOLDER]

Every student has 4 windows, the scheduler's defaults besides what its name says, and as many optimizer steps. It is sampled
with 4 to 16 steps on both grids: "edges" puts every window edge on the grid, "uniform" is the host's 1, 1 - 1/N, ..., whose
steps cross edges unless 4 divides N. Columns: endpoint error as in few_step.py; jump = metrics.velocity_jump at the three inner
edges, in the states that the student itself reaches there with 4 steps, 0.01 above each edge.

Writes smooth_windows.json and smooth_windows.md after every student.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evaluation import Evaluation
from few_step import train
from measures import velocity_jump
from recipes import SCALES, Recipe
from torch import nn
from worlds import MixtureWorld

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.atomic import replacing
from opensora_perflow.method.metrics import endpoint_error
from opensora_perflow.method.process import Linear
from opensora_perflow.method.sampler import carry_to_windows
from opensora_perflow.worlds.mixture import NUM_TIMESTEPS

STEPS = (4, 5, 6, 7, 8, 16)
GRIDS = ("edges", "uniform")
SCALE = SCALES["cpu"]["mixture"]
WIDTH = 128
JUMP_DISTANCE = 0.01


def settings(**draws: Any) -> dict[str, Any]:
    return dict(windows=4, draws=draws)


RECIPES = {
    "plain": settings(edge_mass=0.0),
    "edge mass": settings(),
    "overlap .6": settings(overlap=0.6),
    "overlap .75": settings(overlap=0.75),
    "overlap .9": settings(overlap=0.9),
    "grid 5 + overlap .75": settings(grids=(5,), overlap=0.75),
    "grids 5 6 7 + overlap .6": settings(grids=(5, 6, 7), overlap=0.6),
}


def sampler(grid: str, steps: int, windows: int = 4) -> Any:
    config = dict(
        windows=windows, num_sampling_steps=steps, sampling_grid=grid, guidance=dict(mode="fixed", scale=MixtureWorld.guidance)
    )
    return build_module(dict(type="perflow", **config), SCHEDULERS)


@torch.no_grad()
def edge_jumps(student: nn.Module, evaluation: Evaluation, windows: int = 4) -> float:
    """Root mean square of the student's velocity jumps at the inner edges."""
    y = evaluation.world.text.encode(evaluation.prompts)["y"]
    noise = evaluation.noise
    edges = torch.linspace(1, 0, windows + 1, dtype=torch.float64)[:, None].expand(-1, len(noise))

    velocity = partial(Linear(NUM_TIMESTEPS).velocity, lambda x, timestep: student(x, timestep, y), "velocity", None)
    jumps = []
    for k in range(1, windows):
        x = carry_to_windows(lambda window, rows: velocity, noise, edges, torch.full((len(noise),), k))
        jumps.append(velocity_jump(velocity, x, edges[k], JUMP_DISTANCE))
    return statistics.mean(jump**2 for jump in jumps) ** 0.5


def measure(name: str, recipe: dict[str, Any], iterations: int, seed: int, evaluation: Evaluation) -> dict[str, Any]:
    result = train(Recipe(name, recipe, iterations, WIDTH, steps=()), evaluation.world, seed, evaluation, SCALE)
    student, calls = result["student"], result["cost"]["teacher_calls"]
    errors = {
        grid: {steps: endpoint_error(evaluation.sample(sampler(grid, steps), student), evaluation.endpoints) for steps in STEPS}
        for grid in GRIDS
    }
    return {"name": name, "seed": seed, "teacher_calls": calls, "jump": edge_jumps(student, evaluation), "errors": errors}


def cell(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    """One line per student and grid."""
    lines = [
        f"`{command}`", "",
        "| student | seeds | jump | grid | " + " | ".join(f"N = {steps}" for steps in STEPS) + " |",
        "|---" * (4 + len(STEPS)) + "|",
    ]  # fmt: skip
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        for grid in GRIDS:
            cells = [cell([row["errors"][grid][steps] for row in mine]) for steps in STEPS]
            jump = cell([row["jump"] for row in mine])
            lines.append(f"| {name} | {len(mine)} | {jump} | {grid} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("outputs/smooth_windows"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small: more threads wait for each other
    logging.getLogger("opensora_perflow").setLevel(logging.WARNING)
    command = f"python benchmarks/smooth_windows.py --iterations {args.iterations}"
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        evaluation = Evaluation.of(MixtureWorld(), SCALE.num_samples, seed, floor=False)
        for name in args.recipes:
            rows.append(measure(name, RECIPES[name], args.iterations, seed, evaluation))
            print(json.dumps(rows[-1]), flush=True)
            text = markdown(rows, command)
            with replacing(args.out / "smooth_windows.json") as path:
                path.write_text(json.dumps({"command": command, "rows": rows}, indent=1))
            with replacing(args.out / "smooth_windows.md") as path:
                path.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
