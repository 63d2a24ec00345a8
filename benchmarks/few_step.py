"""Few-step students against their teacher, in one run: endpoint error, distribution and cost, with several seeds.

    python benchmarks/few_step.py [--world mixture video stdit3 mmdit] [--size cpu|full|gpu] [--seeds 0 1 2]
                                  [--recipes NAME ...] [--jobs N] [--open-sora ROOT] [--teacher FILE] [--out FOLDER]

Worlds: see worlds.py. Everything goes through the PeRFlow object, as Open-Sora's scripts go: `training_losses` distils,
`sample` samples; the host's rflow sampler is PeRFlow with one window and CFG (benchmarks/sampler_parity.py). In world mmdit
students learn through the hooks of `perflow_flux`, and Open-Sora's own I2VDenoiser samples them and the teacher. That takes
three network rows for a guided step, of which text to video needs two: NFE counts two.

Every student has two rows at each number of steps: the weights of its last step, and (EMA) their average by the rule of
training/ema.py.

Writes WORLD.json, WORLD.md and WORLD.png. Every seed draws new training data, new student weights (where the student does
not start as a copy) and new noise for evaluation. Columns: NFE = network evaluations a sample (a guided step is 2); endpoint
error = root mean square distance from where 512 guided Euler steps carry the same noise; energy distance to those endpoints
(unbiased, so about 0 for equal distributions; the floor is that of two independent sets of the teacher's); same mode = share
of samples whose nearest mode is the endpoint's; motion = temporal-difference energy over the endpoints'; teacher calls =
evaluations of the teacher during training, per sample of a batch; CPU seconds = of the training process, measurements left
out (on a GPU they say little: the process waits).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from distil import distil
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from worlds import MixtureWorld, MMDiTWorld, VideoWorld, World

from opensora_perflow.atomic import replacing
from opensora_perflow.method.metrics import endpoint_error, energy_distance
from opensora_perflow.tools.plots import save_figure
from opensora_perflow.training.ema import Ema, decay_of

REFERENCE_STEPS = 512
TEACHER = Path("outputs/few_step/mmdit_teacher.safetensors")
CURVE_POINTS = 15
EMA = " (EMA)"
"""After a recipe's name: the average of its weights, by the rule of training/ema.py; without, those of its last step."""


@dataclass(frozen=True)
class Recipe:
    """A student: how it is trained, and with how many steps it is sampled."""

    name: str
    settings: dict[str, Any]
    """Scheduler config besides type and guidance."""
    iterations: int
    width: int | None = None
    """Of the mixture's students."""
    steps: tuple[int, ...] = (4, 8, 16)
    lr_factor: float = 1.0
    """What the world's peak learning rate is multiplied by."""
    chains: int = 0
    """Of a store that the teacher solves before the training; 0: the teacher solves at every step."""


@dataclass(frozen=True)
class Scale:
    """How much work a world gets."""

    iterations: int
    """Training steps of the reference recipe."""
    batch_size: int
    lr: float
    """Peak learning rate: warm-up over 50 steps or a tenth of them, then half a cosine to 0."""
    num_samples: int
    """Samples that are compared."""


SCALES = {
    "cpu": {"mixture": Scale(2000, 256, 2e-3, 2048), "video": Scale(300, 16, 1.5e-4, 32), "mmdit": Scale(200, 16, 5e-4, 32)},
    "full": {
        "mixture": Scale(8000, 256, 2e-3, 4096),
        "video": Scale(3000, 16, 1.5e-4, 128),
        "mmdit": Scale(2000, 16, 5e-4, 128),
    },
    "gpu": {"mixture": Scale(8000, 2048, 2e-3, 16384), "video": Scale(20000, 256, 5e-4, 1024)},
}

REFERENCE = dict(
    windows=4,
    teacher=dict(steps_per_window=8, solver="euler"),
    draws=dict(starts="diffused", edge_mass=0.0, per_solve=1),
)
"""The public PeRFlow recipe: uniform windows and times, diffused starts, one time a solve (arXiv:2405.07510)."""
OURS = dict(windows=4)
"""The scheduler's defaults: student starts, 3/4 of the times at the edge, 2 times a solve, 2 midpoint steps a window."""

STORED = dict(windows=4, draws=dict(edge_mass=1.0))
"""Of stored chains at window edges alone: what a sampler with one step a window asks for."""

VIDEO_PLAN = [1.0, 0.953125, 0.90625, 0.859375, 0.796875, 0.734375, 0.53125, 0.265625, 0.0]
"""What `opensora-perflow plan --windows 8 --student perflow_demo/student.safetensors --student-windows 4` chooses for the tiny
video model after `opensora-perflow demo` (seed 0)."""


def changed(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Settings with some changed; those of teacher and draws are merged into what is there."""
    merged = {
        key: {**settings.get(key, {}), **value} if key in ("teacher", "draws") else value for key, value in changes.items()
    }
    return {**settings, **merged}


def recipes(world: World, iterations: int) -> list[Recipe]:
    """The students that are compared. A solution of ours takes half of the teacher calls of the reference recipe's."""
    edge = changed(REFERENCE, draws=dict(edge_mass=0.75))
    chosen = [
        Recipe("reference recipe", REFERENCE, iterations),
        Recipe("K=1 reflow (InstaFlow)", changed(REFERENCE, windows=1, teacher=dict(steps_per_window=32)), iterations // 4,
               steps=(1, 4, 8, 16)),
        Recipe("ours, the reference's teacher calls", OURS, 2 * iterations),
    ]  # fmt: skip
    if world.name == "mmdit":
        chosen.insert(1, Recipe("ours", OURS, iterations))
        # 16 samples a step over 4 windows: each window of a chain is trained twice.
        chosen.append(Recipe("ours, stored paths", STORED, 10 * iterations, steps=(4,), lr_factor=2.0, chains=20 * iterations))
    elif world.name == "mixture":
        # What each change contributes, and how little and how much training does.
        chosen[1:1] = [
            Recipe("reference + 3/4 of the times at the edge", edge, iterations),
            Recipe("reference + edge + student starts", changed(edge, draws=dict(starts="student")), iterations),
            Recipe("ours", OURS, iterations),
        ]
        chosen.append(Recipe("ours, 1/4 of the reference's teacher calls", OURS, iterations // 2))
        chosen.append(Recipe("ours, 3/2 times as wide, 3/2 as long", OURS, 3 * iterations // 2, width=384))
    else:
        # One midpoint step in each of 8 windows takes half of the calls of 2 in each of 4.
        chosen.append(Recipe("ours, 8 planned windows", changed(OURS, windows=VIDEO_PLAN), 3 * iterations, steps=(8, 16)))
    return chosen


@dataclass
class Evaluation:
    """Noise and prompts that every sampler gets, and where the fine teacher carries them."""

    world: World
    noise: Tensor
    prompts: list[str]
    endpoints: Tensor = field(init=False)
    floor: float = field(init=False, default=math.nan)

    @classmethod
    def of(
        cls, world: World, num_samples: int, seed: int, floor: bool = True, reference_steps: int = REFERENCE_STEPS
    ) -> Evaluation:
        generator = torch.Generator().manual_seed(1000 + seed)
        noise, other = torch.randn(2, num_samples, *world.latent_shape, generator=generator).to(world.device)
        # Seeds take turns, so that few samples each see all prompts together.
        prompts = [world.prompts[(seed * num_samples + i) % len(world.prompts)] for i in range(num_samples)]
        evaluation = cls(world, noise, prompts)
        evaluation.endpoints = evaluation.sample(host_sampler(world, reference_steps), world.teacher, progress=True)
        if not floor:
            return evaluation
        # 64 steps are the same distribution to well below the floor's own noise, and 8 times cheaper.
        again = evaluation.sample(host_sampler(world, 64), world.teacher, other)
        evaluation.floor = energy_distance(again, evaluation.endpoints)
        return evaluation

    @torch.no_grad()
    def sample(self, scheduler: Any, network: nn.Module, noise: Tensor | None = None, progress: bool = False) -> Tensor:
        z, world = self.noise if noise is None else noise, self.world
        sizes = world.sizes(len(z))
        return scheduler.sample(network, world.text, z, self.prompts, world.device, additional_args=sizes, progress=progress)

    def metrics(self, x: Tensor) -> dict[str, float]:
        return {
            "endpoint_error": endpoint_error(x, self.endpoints),
            "energy_distance": energy_distance(x, self.endpoints),
            **self.world.describe(x, self.endpoints, self.prompts),
        }


def host_sampler(world: World, steps: int) -> Any:
    return world.scheduler(dict(windows=1, num_sampling_steps=steps, cfg_scale=world.guidance))


@contextmanager
def teacher_evaluations(kind: type[nn.Module]) -> Iterator[list[int]]:
    """Counts evaluations of frozen networks of a class, in samples: [count]."""
    samples = [0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, kind) and not next(module.parameters()).requires_grad:
            samples[0] += len(inputs[0])

    handle = register_module_forward_pre_hook(count)
    try:
        yield samples
    finally:
        handle.remove()


def train(recipe: Recipe, world: World, seed: int, evaluation: Evaluation, scale: Scale) -> dict[str, Any]:
    """Distil one student, and measure it at each of its step counts."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    # watch=None: this measures for itself, and its teacher's calls are counted.
    config = dict(watch=None, guidance=dict(mode="fixed", scale=world.guidance), **recipe.settings)
    curve: list[list[float]] = []
    every = max(1, recipe.iterations // CURVE_POINTS)
    rate, desc = recipe.lr_factor * scale.lr, f"seed {seed}, {recipe.name}"
    seconds, began = 0.0, time.process_time()
    with TemporaryDirectory() as folder, teacher_evaluations(world.counted) as samples:
        batch = world.batch
        if recipe.chains:
            batch = world.stored(config, Path(folder), recipe.chains, 1000 + seed)
            config = changed(config, teacher=dict(stored=folder))
        student, scheduler = world.learner(recipe.width, config)

        def loss() -> Tensor:
            data, model_args = batch(scale.batch_size, generator)
            return scheduler.training_losses(student, data, model_args)["loss"].mean()

        trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
        averages = Ema(trained, decay_of(recipe.iterations))
        for bar in distil(student, loss, iterations=recipe.iterations, lr=rate, desc=desc):
            averages.update(trained)
            if bar.n % every == 0:
                seconds += time.process_time() - began
                student.eval()
                error = endpoint_error(evaluation.sample(scheduler, student), evaluation.endpoints)
                student.train()
                curve.append([bar.n, samples[0] / scale.batch_size, seconds, error])
                bar.set_postfix(error=f"{error:.4f}")
                began = time.process_time()
    seconds += time.process_time() - began
    student.eval()
    rows = []
    last = {name: value.detach().clone() for name, value in trained.items()}
    for name, weights in {f"{recipe.name}{EMA}": averages.averages, recipe.name: last}.items():
        student.load_state_dict(weights, strict=False)
        for steps in recipe.steps:
            sampler = world.scheduler(dict(config, num_sampling_steps=steps))
            measured = evaluation.metrics(evaluation.sample(sampler, student))
            rows.append({"sampler": name, "steps": steps, "nfe": steps, **measured})
    cost = {
        "teacher_calls": samples[0] / scale.batch_size,
        "optimizer_steps": recipe.iterations,
        "train_seconds": seconds,
    }
    return {"rows": [{**row, **cost} for row in rows], "curve": curve, "cost": cost, "student": student, "scheduler": scheduler}


def run_seed(world: World, seed: int, chosen: Sequence[Recipe], scale: Scale) -> dict[str, Any]:
    evaluation = Evaluation.of(world, scale.num_samples, seed)
    rows = []
    for steps in world.teacher_steps:
        x = evaluation.sample(host_sampler(world, steps), world.teacher)
        rows.append({"sampler": world.host_sampler, "steps": steps, "nfe": 2 * steps, **evaluation.metrics(x)})
    curves = {}
    for recipe in chosen:
        result = train(recipe, world, seed, evaluation, scale)
        rows += result["rows"]
        curves[recipe.name] = result["curve"]
        for row in result["rows"]:
            print(
                f"{world.name}  seed {seed}  {recipe.name:44} {row['steps']:3d} steps  error {row['endpoint_error']:.4f}  "
                f"energy {row['energy_distance']:.5f}  {world.own_column} {row[world.own_column]:.3f}  "
                f"{row['train_seconds']:.0f} s",
                flush=True,
            )
    return {"seed": seed, "floor": evaluation.floor, "rows": rows, "curves": curves}


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per sampler and step count: mean and standard deviation over the seeds."""
    table: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in results:
        for row in result["rows"]:
            table.setdefault((row["sampler"], row["steps"]), []).append(row)
    summary = []
    for rows in table.values():
        merged = {key: rows[0][key] for key in ("sampler", "steps", "nfe")}
        for key in rows[0].keys() - merged.keys():
            values = [row[key] for row in rows]
            merged[key] = statistics.mean(values)
            merged[key + "_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        summary.append(merged)
    return summary


def reaches(results: list[dict[str, Any]], first: str, second: str) -> dict[str, float] | None:
    """Where the second recipe's error first falls to the best of the first: shares of its calls, steps and seconds.

    Mean over the seeds; None if a seed never gets there, or a recipe is missing.
    """
    shares = []
    for result in results:
        if not {first, second} <= result["curves"].keys():
            return None
        best = min(result["curves"][first], key=lambda point: point[3])
        there = next((point for point in result["curves"][second] if point[3] <= best[3]), None)
        if there is None:
            return None
        shares.append([mine / theirs for mine, theirs in zip(there[:3], best[:3])])
    steps, calls, seconds = (statistics.mean(values) for values in zip(*shares))
    return {"optimizer_steps": steps, "teacher_calls": calls, "seconds": seconds}


def markdown(world: World, results: list[dict[str, Any]], command: str) -> str:
    """The table, as benchmarks/README.md shows it."""
    floors = [result["floor"] for result in results]
    several = len(floors) > 1

    def cell(mean: float, spread: float, digits: int) -> str:
        return f"{mean:.{digits}f} ± {spread:.{digits}f}" if several else f"{mean:.{digits}f}"

    floor = cell(1000 * statistics.mean(floors), 1000 * statistics.stdev(floors) if several else 0.0, 2)
    own = world.own_column.replace("_", " ")
    lines = [
        f"`{command}`",
        "",
        (f"Mean and standard deviation of {len(floors)} seeds." if several else f"Seed {results[0]['seed']} alone.")
        + f" Energy distance in 1/1000; two independent sets of the teacher's samples are {floor} apart.",
        "",
        f"| sampler | NFE | endpoint error | energy distance | {own} | teacher calls | optimizer steps | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summarise(results):
        cost = "| | | |"
        if "teacher_calls" in row:
            cost = f"| {row['teacher_calls']:.0f} | {row['optimizer_steps']:.0f} | {row['train_seconds']:.0f} |"
        lines.append(
            f"| {row['sampler'].strip()}, {row['steps']} steps | {row['nfe']} "
            f"| {cell(row['endpoint_error'], row['endpoint_error_std'], 4)} "
            f"| {cell(1000 * row['energy_distance'], 1000 * row['energy_distance_std'], 2)} "
            f"| {row[world.own_column]:.1%} {cost}"
        )
    names = list(results[0]["curves"])
    for name in names[1:]:
        if name.startswith("ours") and (share := reaches(results, names[0], name)) is not None:
            lines += ["", f"The best error of the {names[0]} is reached by \"{name}\" with {share['teacher_calls']:.2f} of its "
                      f"teacher calls, {share['optimizer_steps']:.2f} of its optimizer steps, {share['seconds']:.2f} of its "
                      "CPU seconds."]  # fmt: skip
    return "\n".join(lines) + "\n"


def figure(results: list[dict[str, Any]], path: Path) -> None:
    """Error against NFE, and error while training against what the teacher was asked."""
    summary = summarise(results)
    drawing = Figure(figsize=(15, 4.4), dpi=110, layout="constrained")
    left, right = drawing.subplots(1, 2)
    names = list(dict.fromkeys(row["sampler"] for row in summary))
    for i, name in enumerate(names):
        rows = [row for row in summary if row["sampler"] == name]
        nfe, error, spread = ([row[key] for row in rows] for key in ("nfe", "endpoint_error", "endpoint_error_std"))
        style = {"color": "#8a8a8a"} if i == 0 else {"color": f"C{(i - 1) % 10}", "linestyle": ("-", "--", ":")[(i - 1) // 10]}
        left.errorbar(nfe, error, spread, marker="o", capsize=3, label=name.strip(), **style)
        curve = results[0]["curves"].get(name, [])
        right.plot([point[1] for point in curve], [point[3] for point in curve], **style)
    left.set(xscale="log", yscale="log", xlabel="network evaluations a sample (NFE)", ylabel="endpoint error", title="Sampling")
    left.set_xticks([4, 8, 16, 32, 60], ["4", "8", "16", "32", "60"])
    left.minorticks_off()
    right.set(
        xscale="log", yscale="log", xlabel="teacher evaluations per sample of a batch", ylabel="error, one step a window",
        title=f"Training, seed {results[0]['seed']}",
    )  # fmt: skip
    drawing.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    save_figure(drawing, path)


def write(world: World, results: list[dict[str, Any]], out: Path, command: str) -> str:
    """Table, numbers and plot of a world; returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(world, results, command)
    record = {"command": command, "torch": torch.__version__, "summary": summarise(results), "seeds": results}
    with replacing(out / f"{world.name}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1))
    with replacing(out / f"{world.name}.md") as temporary:
        temporary.write_text(text)
    figure(results, out / f"{world.name}.png")
    return text


def make_world(name: str, device: str, open_sora: Path | None, teacher: Path = TEACHER) -> World:
    if name == "mmdit":
        if device != "cpu":
            raise SystemExit("world mmdit runs on a CPU: choose --size cpu or full")
        return MMDiTWorld(open_sora, teacher)
    if name == "stdit3" and open_sora is None:
        raise SystemExit("world stdit3 is Open-Sora's own class: give --open-sora ROOT, a v1.2.0 or v1.3 checkout")
    return MixtureWorld(device) if name == "mixture" else VideoWorld(device, open_sora if name == "stdit3" else None)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", nargs="+", choices=("mixture", "video", "stdit3", "mmdit"), default=["mixture"])
    parser.add_argument(
        "--size",
        choices=tuple(SCALES),
        default="cpu",
        help="cpu: minutes a recipe; full: longer; gpu: on CUDA, larger",
    )
    parser.add_argument("--full", action="store_const", const="full", dest="size", help="the same as --size full")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--open-sora", type=Path, metavar="ROOT", help="checkout for the worlds stdit3 and mmdit")
    parser.add_argument(
        "--teacher", type=Path, default=TEACHER, help=f"weights for the world mmdit, made if not there (default {TEACHER})"
    )
    parser.add_argument("--recipes", nargs="+", help="only the recipes of these names, or whose names contain these")
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run at the same time, one core each (default 1)")
    return parser


def set_up_process() -> None:
    torch.set_num_threads(1)  # the networks are small: more threads wait for each other
    logging.getLogger("opensora_perflow").setLevel(logging.WARNING)
    parent = multiprocessing.parent_process()
    if parent is not None:  # a pool that was killed does not end its workers
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run_seeds(
    world: World, seeds: Sequence[int], chosen: Sequence[Recipe], scale: Scale, jobs: int
) -> Iterator[dict[str, Any]]:
    """The results of `run_seed` as they come, with `jobs` seeds at the same time."""
    if jobs == 1:
        yield from (run_seed(world, seed, chosen, scale) for seed in seeds)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=set_up_process) as pool:
        for done in as_completed(pool.submit(run_seed, world, seed, chosen, scale) for seed in seeds):
            yield done.result()


def select(known: Sequence[Recipe], asked: Sequence[str] | None) -> list[Recipe]:
    """The recipes of these names, or whose names contain one that is nobody's name; all of them where none is asked for."""
    names = {recipe.name for recipe in known}
    return [
        recipe
        for recipe in known
        if not asked or any(part == recipe.name or (part in recipe.name and part not in names) for part in asked)
    ]


def run(args: argparse.Namespace, script: str, recipes_of: Any) -> None:
    set_up_process()
    for name in args.world:
        world = make_world(name, "cuda" if args.size == "gpu" else "cpu", args.open_sora, args.teacher)
        scale = SCALES[args.size]["video" if name == "stdit3" else name]
        chosen = select(recipes_of(world, scale.iterations), args.recipes)
        command = f"python benchmarks/{script} --world {name}" + f" --size {args.size}" * (args.size != "cpu")
        command += f" --open-sora {args.open_sora.resolve().name}" if args.open_sora and name in ("stdit3", "mmdit") else ""
        command += "" if args.seeds == [0, 1, 2] else f" --seeds {' '.join(map(str, args.seeds))}"
        command += "" if not args.recipes else " --recipes " + " ".join(f'"{part}"' for part in args.recipes)
        results: list[dict[str, Any]] = []
        for result in run_seeds(world, args.seeds, chosen, scale, args.jobs):
            results.append(result)
            results.sort(key=lambda result: args.seeds.index(result["seed"]))
            # Written after every seed: a run that is stopped leaves the seeds that it finished.
            text = write(world, results, args.out, command)
        print(text)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/few_step"), help="folder (default outputs/few_step)")
    run(parser.parse_args(), "few_step.py", recipes)


if __name__ == "__main__":
    main()
