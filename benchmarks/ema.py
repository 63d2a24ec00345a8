"""Raw weights against their average (EMA), by the average's horizon: what the rule of training/ema.py was chosen by.

    python benchmarks/ema.py [--world mixture video] [--seeds 0 1 2] [--out FOLDER]

Students of the defaults, trained as Open-Sora trains: at a constant learning rate after a warm-up. Averages of several
horizons are kept of one and the same run. A horizon, 1 / (1 - decay), is a share of the run's steps. Columns: endpoint error
and energy distance (1/1000), as in few_step.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from copy import deepcopy
from pathlib import Path

import torch
from distil import distil
from evaluation import Evaluation
from few_step import make_world, set_up_process
from recipes import OURS, SCALES
from worlds import World

from opensora_perflow.atomic import replacing
from opensora_perflow.training.ema import Ema

SHARES = (0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
STEPS = {"mixture": (250, 1000, 4000), "video": (100,)}
REFERENCE = {"mixture": 512, "video": 128}
"""Euler steps of the reference; only differences within a run are read."""


def run(world: World, seed: int, steps: int, evaluation: Evaluation) -> dict[str, tuple[float, float]]:
    """raw and each share -> (endpoint error, energy distance) after so many steps."""
    scale = SCALES["cpu"][world.name]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student, scheduler = world.learner(None, dict(watch=None, guidance=dict(mode="fixed", scale=world.guidance), **OURS))

    def loss() -> torch.Tensor:
        data, model_args = world.batch(scale.batch_size, generator)
        return scheduler.training_losses(student, data, model_args)["loss"].mean()

    averages = {share: Ema(dict(student.named_parameters()), max(0.0, 1 - 1 / (share * steps))) for share in SHARES}
    for _bar in distil(student, loss, iterations=steps, lr=scale.lr, desc=f"{world.name} {steps} seed {seed}", constant=True):
        for average in averages.values():
            average.update(dict(student.named_parameters()))
    found, network = {"raw": measure(evaluation, scheduler, student)}, deepcopy(student)
    for share, average in averages.items():
        network.load_state_dict(average.averages, strict=False)
        found[str(share)] = measure(evaluation, scheduler, network)
    return found


def measure(evaluation: Evaluation, scheduler: object, network: torch.nn.Module) -> tuple[float, float]:
    found = evaluation.metrics(evaluation.sample(scheduler, network.eval()))
    return found["endpoint_error"], 1000 * found["energy_distance"]


def markdown(results: dict[int, list[dict[str, tuple[float, float]]]]) -> str:
    names = ["raw", *map(str, SHARES)]
    lines = [f"| steps | {' | '.join(names)} |", "|" + "---|" * (1 + len(names))]
    for steps, seeds in results.items():
        cells = (
            " / ".join(f"{statistics.mean(one[name][i] for one in seeds):.{digits}f}" for i, digits in ((0, 4), (1, 2)))
            for name in names
        )
        lines.append(f"| {steps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/ema"), help="folder (default outputs/ema)")
    args = parser.parse_args()
    set_up_process()
    for name in args.world:
        world, results = make_world(name, "cpu", None), {}
        for seed in args.seeds:
            evaluation = Evaluation.of(world, SCALES["cpu"][name].num_samples, seed, False, REFERENCE[name])
            for steps in STEPS[name]:
                results.setdefault(steps, []).append(run(world, seed, steps, evaluation))
                print(name, seed, steps, results[steps][-1], f"{time.process_time():.0f} CPU s", flush=True)
            args.out.mkdir(parents=True, exist_ok=True)
            with replacing(args.out / f"{name}.json") as temporary:
                temporary.write_text(json.dumps(results, indent=1))
        with replacing(args.out / f"{name}.md") as temporary:
            temporary.write_text(markdown(results))
        print(markdown(results))


if __name__ == "__main__":
    main()
