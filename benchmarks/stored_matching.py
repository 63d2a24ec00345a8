"""Students of the tiny video model for 1 and 2 evaluations from stored paths, without and with the energy distance in the loss.

    python benchmarks/stored_matching.py [--seeds 0 1 2] [--windows 1 2] [--students regression energy] [--iterations N]
                                         [--out FOLDER]

All students of a seed train from one store: 512 chains, each with a further solution of the first window, 6 midpoint steps a
window. So half of a chain's 12 steps lie in the first fifth of time, where its mode is decided. Measures are those of the last
step's weights, on 128 noises of each seed that no store has. Error and energy distance (1/1000) are those of few_step.py, with
95 % intervals; motion is the student's over the teacher's. Feature distance = energy distance (1/1000) of the teacher's hidden
states, averaged over space, at samples noised to t = 0.3: nothing is trained for it. As described = share of samples that show
what their prompts say, of the student and of the teacher.

Writes stored_matching.json and stored_matching.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import energy  # noqa: F401 - registers its objective
import torch
from chains import Chains, solve
from distil import distil
from evaluation import Evaluation
from few_step import make_world, set_up_process
from measures import Estimate, energy_estimate, error_estimate, squared_errors
from recipes import BETAS, SCALES
from torch import Tensor
from worlds import World

from opensora_perflow.atomic import replacing
from opensora_perflow.conventions import interpolate
from opensora_perflow.method.metrics import energy_distance
from opensora_perflow.tools.report import as_described
from opensora_perflow.worlds.codec import TinyVAE

EDGES = {1: [1.0, 0.0], 2: [1.0, 0.796875, 0.0]}
"""By the windows; the second's are every fourth of recipes.VIDEO_PLAN's."""
SHARES = {1: [1], 2: [2, 1]}
ENERGY = {1: dict(weight=16.0, motion=2.0), 2: dict(weight=8.0, motion=1.0)}
"""Keys of the objective perflow_energy, by the windows."""
STORED, CHAINS, FURTHER = dict(windows=EDGES[2], teacher=dict(steps_per_window=6)), 512, 1
ITERATIONS, RATE, SAMPLES = 400, 4e-4, 128


def objective(student: str, windows: int) -> list[dict[str, Any]]:
    terms: list[dict[str, Any]] = [dict(type="perflow")]
    return terms + [dict(type="perflow_energy", **ENERGY[windows])] * (student == "energy")


def features(world: World, x: Tensor, prompts: Sequence[str]) -> Tensor:
    """Of samples x [B, ...]: the teacher's hidden states after its last block, [B, T, hidden]."""
    found: list[Tensor] = []
    last = world.teacher.temporal_blocks[-1]
    handle = last.register_forward_hook(lambda module, inputs, output: found.append(output.mean(dim=2)))
    t = torch.full((len(x),), 0.3, dtype=torch.float64)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        world.teacher(interpolate(x, noise, t), 1000 * t.float(), **world.text.encode(prompts), **world.sizes(len(x)))
    handle.remove()
    return found[0]


def measured(evaluation: Evaluation, x: Tensor) -> dict[str, Any]:
    world, ends, prompts = evaluation.world, evaluation.endpoints, evaluation.prompts
    vae = TinyVAE().eval()

    def listed(estimate: Estimate, factor: float = 1.0) -> list[float]:
        return [factor * value for value in (estimate.value, estimate.low, estimate.high)]

    with torch.no_grad():
        return {
            "error": listed(error_estimate(squared_errors(x, ends))),
            "energy": listed(energy_estimate(x, ends), 1000.0),
            "motion": world.describe(x, ends, prompts)["motion"],
            "feature": 1000 * energy_distance(features(world, x, prompts), features(world, ends, prompts)),
            "described": as_described(vae, x, prompts),
            "teacher_described": as_described(vae, ends, prompts),
        }


def train(evaluation: Evaluation, chains: Chains, name: str, windows: int, seed: int, iterations: int) -> dict[str, Any]:
    """One student's row."""
    world, batch_size = evaluation.world, SCALES["cpu"]["video"].batch_size
    settings = dict(
        base(world),
        windows=EDGES[windows],
        teacher=dict(stored=str(chains.folder)),
        draws=dict(seed=seed, edge_mass=1.0, shares=SHARES[windows]),
        objective=objective(name, windows),
    )
    torch.manual_seed(seed)
    student, scheduler = world.learner(None, settings)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        data = torch.zeros(batch_size, *world.latent_shape)
        return scheduler.training_losses(student, data, chains.next(batch_size, generator))["loss"].mean()

    began, desc = time.process_time(), f"seed {seed}, {windows}, {name}"
    for _ in distil(student, loss, iterations=iterations, lr=RATE, desc=desc, betas=BETAS):
        pass
    seconds = time.process_time() - began
    student.eval()
    row = measured(evaluation, evaluation.sample(scheduler, student))
    return {"windows": windows, "student": name, "seed": seed, "iterations": iterations, "seconds": seconds, **row}


def base(world: World) -> dict[str, Any]:
    return dict(watch=None, guidance=dict(mode="fixed", scale=world.guidance))


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| NFE | student | seed | steps | CPU seconds | error | energy distance | motion | feature distance | as described |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        cells = [row["windows"], row["student"], row["seed"], row["iterations"], f"{row['seconds']:.0f}"]
        cells += ["{:.3f} ({:.3f} to {:.3f})".format(*row["error"]), "{:.2f} ({:.2f} to {:.2f})".format(*row["energy"])]
        cells += [f"{row['motion']:.1%}", f"{row['feature']:.2f}", f"{row['described']:.0%} of {row['teacher_described']:.0%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, nargs="+", choices=tuple(EDGES), default=list(EDGES))
    parser.add_argument("--students", nargs="+", choices=("regression", "energy"), default=["regression", "energy"])
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help=f"steps of each student (default {ITERATIONS})")
    parser.add_argument("--out", type=Path, default=Path("outputs/stored_matching"), help="default outputs/stored_matching")
    args = parser.parse_args()
    set_up_process()
    args.out.mkdir(parents=True, exist_ok=True)
    world, rows = make_world("video", "cpu", None), []
    for seed in args.seeds:
        evaluation = Evaluation.of(world, SAMPLES, seed, floor=False)
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            chains = solve(world, Path(folder), CHAINS, seed + 1000, {**base(world), **STORED}, further=FURTHER)
            print(f"seed {seed}: store of {time.process_time() - began:.0f} CPU seconds", flush=True)
            for windows in args.windows:
                for student in args.students:
                    rows.append(train(evaluation, chains.first(CHAINS), student, windows, seed, args.iterations))
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
                    for kind, text in (("json", json.dumps(rows, indent=1)), ("md", table(rows))):
                        with replacing(args.out / f"stored_matching.{kind}") as path:
                            path.write_text(text)


if __name__ == "__main__":
    main()
