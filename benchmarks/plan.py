"""Planned windows and grids against uniform ones: students of the mixture or of the demo's tiny video model, several seeds.

    python benchmarks/plan.py [--model mixture|video] [--windows 4 8] [--seeds 0 1 2] [--iterations N] [--out FOLDER]

For each number of windows K:
  1. a pilot student is trained with K uniform windows (its own seed, 100), its window errors are measured and edges planned by
     both criteria (planning/windows.py); of the pilots with uniform and with each planned windows the best one's are taken;
  2. for every seed one student is trained with uniform and one with planned edges, everything else alike, and both are
     measured on the same fresh noise: endpoint error (root mean square distance from where the guided teacher's fine steps
     carry it) and energy distance to those endpoints;
  3. grids for 1..4K steps are grown on other noise (planning/extra_steps.py) and compared with the default grids.
With --grids: the teacher itself, on grids planned once (noise of seed 100) against uniform ones (planning/grids.py).

Students train without data, from states that they reach themselves, all in the PeRFlow object. Writes JSON into FOLDER.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from distil import distil
from torch import Tensor, nn

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.method.grids import linear_grid, sampling_grid
from opensora_perflow.method.metrics import endpoint_error, energy_distance
from opensora_perflow.method.solvers import solve
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.planning.extra_steps import grids_by_steps
from opensora_perflow.planning.fine_path import follow, step_errors, uniform_grid
from opensora_perflow.planning.grids import choose_grid, compare
from opensora_perflow.planning.probe import Probe
from opensora_perflow.planning.shortest_path import shortest_path
from opensora_perflow.planning.windows import CRITERIA, plan_windows
from opensora_perflow.tools import probes
from opensora_perflow.worlds.clips import contents
from opensora_perflow.worlds.mixture import NUM_CLASSES, ClassText, Mixture, MixtureNetwork
from opensora_perflow.worlds.model import load_teacher
from opensora_perflow.worlds.text import TinyTextEncoder

PILOT_SEED = 100


class MixtureWorld:
    """The 16-dimensional mixture, guidance 2."""

    scale, lr, batch_size = 2.0, 2e-3, 256
    samples, pilot_samples, substeps, candidates = 2048, 512, 2, 64

    def student(self) -> nn.Module:
        return MixtureNetwork(Mixture.standard())

    def probe(self, num_samples: int, seed: int, network: nn.Module | None = None) -> Probe:
        return probes.mixture_probe(num_samples, seed, self.scale if network is None else 1.0, network)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        class_idx = torch.randint(NUM_CLASSES, (self.batch_size,), generator=generator)
        return torch.zeros(self.batch_size, 16, 1, 1, 1), ClassText().of(class_idx)


class VideoWorld:
    """The demo's tiny STDiT3, guidance 3."""

    scale, lr, batch_size = 3.0, 2e-4, 8
    samples, pilot_samples, substeps, candidates = 128, 64, 1, 32

    def student(self) -> nn.Module:
        return load_teacher()

    def probe(self, num_samples: int, seed: int, network: nn.Module | None = None) -> Probe:
        return probes.video_probe(num_samples, seed, self.scale if network is None else 1.0, network)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        captions = probes.shuffled((content.caption for content in contents()), self.batch_size, generator)
        model_args = {**TinyTextEncoder().encode(captions), **probes.sizes(self.batch_size)}
        return torch.zeros(self.batch_size, *probes.LATENT_SHAPE), model_args


def train(world: Any, edges: Sequence[float], iterations: int, seed: int) -> nn.Module:
    """A student with these windows, in eval mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student = world.student()
    config = dict(type="perflow", windows=list(edges), guidance=dict(mode="fixed", scale=world.scale))
    scheduler = build_module(config, SCHEDULERS)

    def loss() -> Tensor:
        data, model_args = world.batch(generator)
        return scheduler.training_losses(student, data, model_args)["loss"].mean()

    for _ in distil(student, loss, iterations=iterations, lr=world.lr, desc=f"student, seed {seed}"):
        pass
    return student.eval()


def plan_edges(world: Any, num_windows: int, iterations: int) -> tuple[tuple[float, ...], list[dict[str, Any]]]:
    """The edges whose pilot ends nearest to the teacher, and what each pilot measured: uniform, and each criterion's."""
    teacher, pilots = world.probe(world.pilot_samples, PILOT_SEED), []
    candidates = {"uniform": uniform_grid(num_windows)}
    while len(pilots) < len(candidates):
        name, edges = list(candidates.items())[len(pilots)]
        student = world.probe(world.pilot_samples, PILOT_SEED, train(world, edges, iterations, PILOT_SEED))
        path = follow(teacher, edges, substeps=max(2, 64 // num_windows), method="heun")
        pilot = {"name": name, "edges": edges, "error": endpoint_error(student.sample(edges), path.endpoints)}
        for criterion, measure_errors in CRITERIA.items():
            pilot[criterion] = measure_errors(student, path)
            if name == "uniform":
                candidates[criterion], _ = plan_windows(edges, pilot[criterion], num_windows)
        pilots.append(pilot)
        print(
            f"K={num_windows} pilot {name} {rounded(edges)}: error {pilot['error']:.4f}, added {rounded(pilot['added'])}, "
            f"local {rounded(pilot['local'])}",
            flush=True,
        )
    return min(pilots, key=lambda pilot: pilot["error"])["edges"], pilots


def teacher_edges(world: Any, num_windows: int) -> tuple[float, ...]:
    """Edges from the teacher alone: the least sum of squared errors of one Euler step a window."""
    path = follow(world.probe(world.pilot_samples, PILOT_SEED), world.candidates, substeps=world.substeps, method="heun")
    indices, _ = shortest_path(step_errors(path).square(), num_windows)
    return tuple(path.times[list(indices)].tolist())


def measure(world: Any, student: nn.Module, edges: Sequence[float], path: Any, seed: int) -> dict[str, Any]:
    """Error and energy distance on the path's noise, one step a window."""
    x = world.probe(world.samples, seed, student).sample(edges)
    return {"error": endpoint_error(x, path.endpoints), "energy": energy_distance(x, path.endpoints)}


def any_steps(world: Any, student: nn.Module, edges: Sequence[float], path: Any, seed: int) -> list[dict[str, Any]]:
    """Error on fresh noise for 1..4K steps: the default grid, and the one grown on other noise."""
    num_windows = len(edges) - 1
    count = world.pilot_samples
    endpoints = follow(world.probe(count, seed + 500), 64, substeps=2, method="heun").endpoints
    grown = grids_by_steps(world.probe(count, seed + 500, student), endpoints, edges, min(4 * num_windows, 16), places=(0.5,))
    probe, rows = world.probe(world.samples, seed, student), []
    for steps, found in grown.items():
        default = sampling_grid(TimeWindows(tuple(edges)), steps)
        errors = {
            name: endpoint_error(probe.sample(g), path.endpoints)
            for name, g in {"default": default, "grown": found.grid}.items()
        }
        rows.append({"steps": steps, **errors, "predicted": found.error, "grid": found.grid})
        print(f"  {steps:3d} steps: default {errors['default']:.4f}  grown {errors['grown']:.4f}", flush=True)
    return rows


def grids(world: Any, counts: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The teacher itself on grids that are planned once, and on uniform ones, with the fresh noise of each seed."""
    fine = dict(substeps=world.substeps, method="heun", progress=True)
    probe = world.probe(world.samples, PILOT_SEED)
    path = follow(probe, world.candidates, **fine)
    chosen = {steps: choose_grid(probe, path, steps, progress=True) for steps in counts}
    rows = []
    for seed in seeds:
        fresh = world.probe(world.samples, seed)
        endpoints = follow(fresh, world.candidates, **fine).endpoints
        for steps, (grid, predicted) in chosen.items():
            found = compare(grid, predicted, fresh, endpoints)
            rows.append({"seed": seed, "steps": steps, **asdict(found)})
            print(
                f"seed {seed} {steps} steps: planned {found.error:.4f} (predicted {found.predicted:.4f}), uniform "
                f"{found.uniform:.4f}, gain {found.gain:.1f} se, {rounded(found.grid)}",
                flush=True,
            )
    return rows


def substeps(world: Any, num_windows: int, method: str, each: int) -> None:
    """Would the teacher's steps be better divided unevenly among the windows? The best division, by dynamic programming."""
    probe = world.probe(world.pilot_samples, PILOT_SEED)
    path = follow(probe, num_windows, substeps=128 // num_windows, method="heun")
    total, error = each * num_windows, {}
    for k in range(num_windows):
        for count in range(1, 3 * each + 1):
            grid = linear_grid(path.flow_times[k], path.flow_times[k + 1], count)
            with torch.no_grad():
                landed = solve(probe.velocity, path.states[k], grid, method=method)
            error[k, count] = endpoint_error(landed, path.states[k + 1]) ** 2
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for k in range(num_windows):
        ways = [
            (used + count, cost + error[k, count], (*counts, count))
            for used, (cost, counts) in best.items()
            for count in range(1, 3 * each + 1)
            if used + count <= total
        ]
        best = {used: min((cost, counts) for n, cost, counts in ways if n == used) for used, _, _ in ways}
    even = sum(error[k, each] for k in range(num_windows)) ** 0.5
    print(f"K={num_windows}, {total} {method} steps: evenly {even:.4f}, best {best[total][0] ** 0.5:.4f} as {best[total][1]}")


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mixture", "video"), default="mixture")
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=1000, help="training steps of a student; a pilot has half of them")
    parser.add_argument("--grids", type=int, nargs="+", metavar="N", help="plan the teacher's own N steps instead")
    parser.add_argument(
        "--edges", nargs="+", choices=("uniform", "teacher", "planned"), default=["uniform", "planned"],
        help="teacher: edges with the least sum of squared errors of the teacher's own Euler steps, no pilot",
    )  # fmt: skip
    parser.add_argument("--substeps", action="store_true", help="divide the teacher's steps among uniform windows instead")
    parser.add_argument("--any-steps", action="store_true", help="also 1..4K steps, of the first seed's students")
    parser.add_argument("--out", type=Path, default=Path("outputs/plan"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = MixtureWorld() if args.model == "mixture" else VideoWorld()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.grids:
        rows = grids(world, args.grids, args.seeds)
        (args.out / f"grids_{args.model}.json").write_text(json.dumps(rows, indent=1))
        return
    if args.substeps:
        for num_windows in args.windows:
            for method, each in (("midpoint", 2), ("midpoint", 1), ("heun", 2), ("euler", 8), ("euler", 4)):
                substeps(world, num_windows, method, each)
        return
    results = []
    for num_windows in args.windows:
        variants, report = {"uniform": uniform_grid(num_windows)}, []
        if "teacher" in args.edges:
            variants["teacher"] = teacher_edges(world, num_windows)
        if "planned" in args.edges:
            variants["planned"], report = plan_edges(world, num_windows, max(1, args.iterations // 2))
        variants = {name: edges for name, edges in variants.items() if name in args.edges}
        for seed in args.seeds:
            path = follow(world.probe(world.samples, seed), 32, substeps=world.substeps, method="heun")
            for name, edges in variants.items():
                student = train(world, edges, args.iterations, seed)
                row = {"windows": num_windows, "seed": seed, "name": name, "edges": edges, "pilots": report}
                row |= measure(world, student, edges, path, seed)
                print(
                    f"K={num_windows} seed {seed} {name}: error {row['error']:.4f} energy {1000 * row['energy']:.2f}e-3",
                    flush=True,
                )
                if args.any_steps and seed == args.seeds[0]:
                    row["any_steps"] = any_steps(world, student, edges, path, seed)
                results.append(row)
                (args.out / f"students_{args.model}.json").write_text(json.dumps(results, indent=1))
    print(markdown(results))


def markdown(results: list[dict[str, Any]]) -> str:
    lines = ["| K | edges | endpoint error | energy distance / 1000 |", "|---|---|---|---|"]
    for key in dict.fromkeys((row["windows"], row["name"]) for row in results):
        rows = [row for row in results if (row["windows"], row["name"]) == key]
        cells = []
        for name, unit in (("error", 1), ("energy", 1000)):
            values = [unit * row[name] for row in rows]
            cells.append(f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}")
        lines.append(f"| {key[0]} | {key[1]}: {rounded(rows[0]['edges'])} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
