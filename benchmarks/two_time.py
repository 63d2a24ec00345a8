"""One student for 1, 2, 4 and 8 evaluations: told where its steps end (draws.two_time), not told, and a student for each count.

    python benchmarks/two_time.py [--world mixture video] [--seeds 0 1 2] [--iterations N] [--chains N] [--out FOLDER]

All train from the same stored chains with 8 windows, for as many steps, at the same peak learning rate. Error: root mean square
distance from where the finely solved teacher carries the same noise. Energy distance in 1/1000. CPU seconds are the training's;
those of the store come on top, once.

Writes two_time.json and two_time.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from chains import Chains, solve
from distil import distil
from evaluation import Evaluation
from few_step import make_world, set_up_process
from recipes import SCALES
from stored import REFERENCE_STEPS
from torch import Tensor
from worlds import World

from opensora_perflow.atomic import replacing

COUNTS = (1, 2, 4, 8)
STUDENTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "told where steps end": (dict(windows=8, draws=dict(grids=[1, 2, 4], two_time=True)), COUNTS),
    "told, all times at edges": (dict(windows=8, draws=dict(grids=[1, 2, 4], two_time=True, edge_mass=1.0)), COUNTS),
    "not told": (dict(windows=8, draws=dict(grids=[1, 2, 4])), COUNTS),
    **{f"for {count} alone": (dict(windows=count), (count,)) for count in COUNTS},
}
"""Settings, and the numbers of steps that each is sampled with."""
STORED = dict(windows=8, teacher=dict(steps_per_window=2))
ITERATIONS = {"mixture": 4000, "video": 300}
CHAINS = {"mixture": 32768, "video": 1024}
RATE = {"mixture": 3.0, "video": 1.0}
"""Peak learning rate, over few_step.py's."""
SAMPLES = {"mixture": 2048, "video": 64}


def base(world: World) -> dict[str, Any]:
    return dict(watch=None, guidance=dict(mode="fixed", scale=world.guidance))


def train(world: World, chains: Chains, name: str, seed: int, iterations: int, evaluation: Evaluation) -> dict[str, Any]:
    """One student's row."""
    chosen, counts = STUDENTS[name]
    draws = {"seed": seed, **chosen.get("draws", {})}
    settings = {**base(world), **chosen, "teacher": dict(stored=str(chains.folder)), "draws": draws}
    torch.manual_seed(seed)
    student, scheduler = world.student(None), world.scheduler(settings)
    scale, generator = SCALES["cpu"][world.name], torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        data = torch.zeros(scale.batch_size, *world.latent_shape, device=world.device)
        return scheduler.training_losses(student, data, chains.next(scale.batch_size, generator))["loss"].mean()

    began = time.process_time()
    for _ in distil(student, loss, iterations=iterations, lr=RATE[world.name] * scale.lr, desc=f"seed {seed}, {name}"):
        pass
    seconds, row = time.process_time() - began, {}
    student.eval()
    for count in counts:
        sampler = world.scheduler({**settings, "num_sampling_steps": count, "sampling_grid": "uniform"})
        metrics = evaluation.metrics(evaluation.sample(sampler, student))
        row[count] = {"error": metrics["endpoint_error"], "energy": 1000 * metrics["energy_distance"]}
    return {"world": world.name, "seed": seed, "student": name, "seconds": seconds, "steps": row}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| world | seed | student | CPU seconds | " + " | ".join(f"{count} NFE" for count in COUNTS) + " |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        cells = [row["steps"].get(count) for count in COUNTS]
        shown = ["" if cell is None else f"{cell['error']:.4f} / {cell['energy']:.2f}" for cell in cells]
        lines.append(f"| {row['world']} | {row['seed']} | {row['student']} | {row['seconds']:.0f} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", nargs="+", choices=tuple(ITERATIONS), default=list(ITERATIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--students", nargs="+", choices=tuple(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--iterations", type=int, help="steps of each student (default 4000 and 300)")
    parser.add_argument("--chains", type=int, help="of the store (default 32768 and 1024)")
    parser.add_argument("--out", type=Path, default=Path("outputs/two_time"), help="folder (default outputs/two_time)")
    args = parser.parse_args()
    set_up_process()
    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in args.world:
        world = make_world(name, "cpu", None)
        for seed in args.seeds:
            evaluation = Evaluation.of(world, SAMPLES[name], seed, floor=False, reference_steps=REFERENCE_STEPS[name])
            with tempfile.TemporaryDirectory() as folder:
                count = args.chains or CHAINS[name]
                chains = solve(world, Path(folder), count, seed + 1000, {**base(world), **STORED})
                for student in args.students:
                    iterations = args.iterations or ITERATIONS[name]
                    rows.append(train(world, chains, student, seed, iterations, evaluation))
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
                    for file, text in (("two_time.json", json.dumps(rows, indent=1)), ("two_time.md", table(rows))):
                        with replacing(args.out / file) as path:
                            path.write_text(text)


if __name__ == "__main__":
    main()
