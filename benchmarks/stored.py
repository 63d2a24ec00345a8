"""Students of stored chains against students whose teacher solves at every step: a step's cost, error at equal CPU seconds.

    python benchmarks/stored.py [--part step equal chains dtype] [--world mixture video] [--seeds 0 1 2] [--out FOLDER]

Everything goes through the PeRFlow object: `training_losses` takes stored chains as Open-Sora's train.py hands them over, from
float16 safetensors with checksums in a temporary folder. Counted are CPU seconds of the process, on one thread; a store's own
solution, writing and first reading are in them. Students start as the teacher and are trained by distil.py.

step    CPU seconds of a training step (loss, gradient, Adam), online and stored in turns.
equal   A training online gets so many steps. Chains are solved, stored and trained from until the same CPU seconds are used.
        On the mixture both are shown with two peak learning rates; the one to compare is each one's best.
chains  On the video model, so many steps from stores of several sizes: the error on noise that was not stored, and on the first
        chains of the store.
dtype   Students of the same chains in float32, float16 and bfloat16: the rounding itself, and what it does to the students.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from chains import Chains, solve
from distil import distil
from evaluation import Evaluation
from few_step import make_world, set_up_process
from recipes import SCALES, Scale
from torch import Tensor
from worlds import World

from opensora_perflow.atomic import replacing
from opensora_perflow.method.metrics import endpoint_error
from opensora_perflow.training.store import DTYPES, ChainStore

SAMPLES = {"mixture": 2048, "video": 32}
"""That are compared."""
STEPS = {"mixture": 1000, "video": 62}
"""Of the online training of part equal."""
CHAINS = {"mixture": 16384, "video": 320}
"""Of the store of part equal."""
REFERENCE_STEPS = {"mixture": 512, "video": 64}
"""Guided Euler steps to the endpoints that errors are measured from."""
RATES = {"mixture": (1.0, 3.0), "video": (1.0,)}
"""Peak learning rates, over few_step.py's."""
SIZES = (48, 192, 320, 640)
"""Of the stores of part chains."""
TRAINED = 60
"""Steps of part chains and of part dtype on the video model."""


@cache
def evaluation_of(world: World, num_samples: int, seed: int) -> Evaluation:
    return Evaluation.of(world, num_samples, seed, floor=False, reference_steps=REFERENCE_STEPS[world.name])


def settings(world: World, **others: Any) -> dict[str, Any]:
    return dict(watch=None, windows=4, guidance=dict(mode="fixed", scale=world.guidance), **others)


class Student:
    """A student and what distils it: online, or from chains.

    seconds: CPU seconds of training so far. calls: Of the loss.
    """

    def __init__(self, world: World, scale: Scale, seed: int, chains: Chains | None = None, dtype: str | None = None) -> None:
        torch.manual_seed(seed)
        self.world, self.scale, self.chains = world, scale, chains
        folder = None if chains is None else str(chains.folder if dtype is None else chains.folder.parent / dtype)
        self.network = world.student(None)
        self.scheduler = world.scheduler(settings(world, teacher=dict(stored=folder), draws=dict(seed=seed)))
        self.generator = torch.Generator().manual_seed(seed)

    def loss(self) -> Tensor:
        size = self.scale.batch_size
        if self.chains is None:
            data, model_args = self.world.batch(size, self.generator)
        else:
            data, model_args = torch.zeros(size, *self.world.latent_shape), self.chains.next(size, self.generator)
        return self.scheduler.training_losses(self.network, data, model_args)["loss"].mean()

    def train(self, iterations: int, rate: float, desc: str) -> float:
        """CPU seconds of some steps."""
        began = time.process_time()
        for _ in distil(self.network, self.loss, iterations=iterations, lr=rate * self.scale.lr, desc=desc):
            pass
        self.network.eval()
        return time.process_time() - began

    def measured(self, evaluation: Evaluation) -> dict[str, float]:
        """Of 4 steps."""
        return evaluation.metrics(evaluation.sample(self.scheduler, self.network))


def step_cost(world: World, scale: Scale, chains: Chains, seed: int, rounds: int = 20) -> dict[str, float]:
    """CPU seconds of a step of each kind, in turns."""
    students = {"online": Student(world, scale, seed), "stored": Student(world, scale, seed, chains)}
    steps: dict[str, Callable[[], None]] = {name: stepper(student) for name, student in students.items()}
    seconds = dict.fromkeys(steps, 0.0)
    for turn in range(rounds + 2):  # the first two make the teacher and read the store
        for name, step in steps.items():
            began = time.process_time()
            step()
            seconds[name] += (time.process_time() - began) * (turn >= 2)
    return {name: spent / rounds for name, spent in seconds.items()}


def stepper(student: Student) -> Callable[[], None]:
    optimizer = torch.optim.Adam([p for p in student.network.parameters() if p.requires_grad], lr=student.scale.lr)

    def step() -> None:
        optimizer.zero_grad()
        student.loss().backward()
        optimizer.step()

    return step


def equal_seconds(world: World, scale: Scale, seed: int, steps: int, count: int) -> list[dict[str, Any]]:
    """Rows of the online students and of those that get as many CPU seconds for a store, its writing included."""
    evaluation, rows = evaluation_of(world, scale.num_samples, seed), []
    for rate in RATES[world.name]:
        student = Student(world, scale, seed)
        seconds = student.train(steps, rate, f"seed {seed}, online")
        rows.append({"kind": "online", "rate": rate, "steps": steps, "seconds": seconds, **student.measured(evaluation)})
    budget = min(row["seconds"] for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        chains = solve(world, Path(folder), count, seed + 1000, settings(world))
        solved = time.process_time() - began
        each = step_cost(world, scale, chains, seed, rounds=10)["stored"]
        possible = int(0.93 * (budget - solved) / each)  # a shared machine: a step may take more than it took
        for rate in RATES[world.name]:
            student = Student(world, scale, seed, chains)
            seconds = solved + student.train(possible, rate, f"seed {seed}, stored")
            row = {"kind": "stored", "rate": rate, "steps": possible, "seconds": seconds, "solved": solved, "chains": count}
            rows.append({**row, **student.measured(evaluation)})
    return rows


def store_sizes(world: World, scale: Scale, seed: int, steps: int) -> list[dict[str, Any]]:
    """Rows of students of the first chains of one store, as many as SIZES says."""
    evaluation, rows = evaluation_of(world, scale.num_samples, seed), []
    with tempfile.TemporaryDirectory() as folder:
        chains = solve(world, Path(folder), max(SIZES), seed + 1000, settings(world))
        for size in SIZES:
            student = Student(world, scale, seed, chains.first(size))
            student.train(steps, 1.0, f"seed {seed}, {size} chains")
            row = {"chains": size, "passes": steps * scale.batch_size / size, **student.measured(evaluation)}
            rows.append({**row, "on_stored": error_on_stored(student, chains.first(scale.num_samples))})
    return rows


def error_on_stored(student: Student, chains: Chains) -> float:
    """Endpoint error from the noise of chains to their stored ends, which the solver's own error is no part of."""
    store, count = ChainStore(chains.folder), len(chains)
    numbers, places = torch.arange(count), torch.full((count,), len(store.origin.windows) - 1)
    told = {name: value for name, value in chains.told.items() if name not in ("y", "mask")}

    class Text:
        def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
            return {name: chains.told[name] for name in ("y", "mask")}

        def null(self, n: int) -> Tensor:
            return student.world.text.null(n)

    with torch.no_grad():
        noise = store.states(numbers, torch.zeros_like(numbers))
        x = student.scheduler.sample(student.network, Text(), noise, [""] * count, additional_args=told, progress=False)
    return endpoint_error(x, store.states(numbers, places))


def dtypes(world: World, scale: Scale, seed: int, steps: int, count: int) -> list[dict[str, Any]]:
    """Rows of students of the same chains in each dtype; float32 first."""
    names = sorted(DTYPES, key=lambda name: -DTYPES[name].itemsize)
    evaluation, rows = evaluation_of(world, scale.num_samples, seed), []
    with tempfile.TemporaryDirectory() as folder:
        chains = solve(world, Path(folder), count, seed + 1000, settings(world), names)
        numbers = torch.arange(min(count, 256)).repeat_interleave(4)
        exact = ChainStore(chains.folder).states(numbers, torch.arange(1, 5).repeat(len(numbers) // 4))
        for name in names:
            stored = ChainStore(chains.folder.parent / name).states(numbers, torch.arange(1, 5).repeat(len(numbers) // 4))
            student = Student(world, scale, seed, chains, name)
            student.train(steps, 1.0, f"seed {seed}, {name}")
            rounding = (stored - exact).square().mean().sqrt().item()
            rows.append({"dtype": name, "rounding": rounding, **student.measured(evaluation)})
    return rows


def summary(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row for each value of the keys: means over the seeds, and the seeds' errors."""
    for group in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        found = [row for row in rows if tuple(row[key] for key in keys) == group]
        means = {
            name: statistics.mean(row[name] for row in found)
            for name, value in found[0].items()
            if isinstance(value, float | int)
        }
        yield {**means, **dict(zip(keys, group)), "errors": [row["endpoint_error"] for row in found]}


def table(rows: Sequence[dict[str, Any]], keys: Sequence[str], columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join([*keys, *columns, "endpoint error", "each seed's", "energy distance"]) + " |"]
    lines.append("|" + "---|" * (len(keys) + len(columns) + 3))
    for row in summary(rows, keys):
        cells = [
            f"{row[name]:.4g}" if isinstance(row.get(name), float) else str(row.get(name, "")) for name in [*keys, *columns]
        ]
        each = ", ".join(f"{error:.4f}" for error in row["errors"])
        cells += [f"{row['endpoint_error']:.4f}", each, f"{1000 * row['energy_distance']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_part(part: str, world: World, scale: Scale, seeds: Sequence[int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        if part == "step":
            with tempfile.TemporaryDirectory() as folder:
                chains = solve(world, Path(folder), 4 * scale.batch_size, seed, settings(world))
                found = [step_cost(world, scale, chains, seed)]
        elif part == "equal":
            found = equal_seconds(world, scale, seed, STEPS[world.name], CHAINS[world.name])
        elif part == "chains":
            found = store_sizes(world, scale, seed, TRAINED)
        else:
            found = dtypes(world, scale, seed, STEPS[world.name] if world.name == "mixture" else TRAINED, CHAINS[world.name])
        rows += [{"world": world.name, "seed": seed, **row} for row in found]
        print(json.dumps(rows[-len(found) :]), file=sys.stderr, flush=True)
    return rows


def shown(part: str, rows: Sequence[dict[str, Any]]) -> str:
    if part == "step":
        online, stored = (statistics.mean(row[kind] for row in rows) for kind in ("online", "stored"))
        return f"CPU seconds a step: online {online:.4g}, stored {stored:.4g}, {stored / online:.2f} of it"
    keys, columns = {
        "equal": (["kind", "rate"], ["chains", "steps", "solved", "seconds"]),
        "chains": (["chains"], ["passes", "on_stored"]),
        "dtype": (["dtype"], ["rounding"]),
    }[part]
    return table(rows, keys, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", nargs="+", choices=("step", "equal", "chains", "dtype"), default=["step", "equal", "chains", "dtype"]
    )
    parser.add_argument("--world", nargs="+", choices=("mixture", "video"), default=["mixture", "video"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/stored"), help="folder for the numbers (default outputs/stored)"
    )
    args = parser.parse_args()
    set_up_process()
    for name in args.world:
        world = make_world(name, "cpu", None)
        scale = replace(SCALES["cpu"][name], num_samples=SAMPLES[name])
        for part in args.part:
            if part == "chains" and name == "mixture":
                continue
            rows = run_part(part, world, scale, args.seeds)
            with replacing(args.out / f"{name}_{part}.json") as temporary:
                temporary.write_text(json.dumps({"command": " ".join(sys.argv), "rows": rows}, indent=1))
            print(f"\n{name}, part {part}, seeds {args.seeds}\n\n{shown(part, rows)}\n", flush=True)


if __name__ == "__main__":
    main()
