"""Few-step students against their teacher, in one run: endpoint error, distribution and cost, with several seeds.

    python benchmarks/few_step.py [--world mixture forty rings ar1 video stdit3 mmdit] [--size cpu|full|gpu] [--seeds 0 1 2]
                                  [--recipes NAME ...] [--paper] [--jobs N] [--open-sora ROOT] [--teacher FILE] [--out FOLDER]

Worlds: see worlds.py. Everything goes through the PeRFlow object, as Open-Sora's scripts go: `training_losses` distils,
`sample` samples; the host's rflow sampler is PeRFlow with one window and CFG (benchmarks/sampler_parity.py). In world mmdit
students learn through the hooks of `perflow_flux`, and Open-Sora's own I2VDenoiser samples them and the teacher. That takes
three network rows for a guided step, of which text to video needs two: NFE counts two.

Every student has two rows at each number of steps: the weights of its last step, and (EMA) their average by the rule of
training/ema.py.

Writes WORLD.json (with the error of every sample), WORLD.md and WORLD.png. Every seed draws new training data, new student
weights (where the student does not start as a copy) and new noise for evaluation. Measures are those of all seeds' samples
together, with the percentile intervals of 1,000 resamples (measures.py), and beside them each seed's. Columns: NFE = network
evaluations a sample (a guided step is 2); endpoint error = root mean square distance from where 512 guided Euler steps carry
the same noise (the demo's 36 midpoint steps in the video model); median = of the samples' errors; energy distance to those
endpoints (unbiased, so about 0 for equal distributions; the floor is that of two independent sets of the teacher's); same
mode = share of samples whose nearest mode is the endpoint's; motion = temporal-difference energy over the endpoints';
teacher calls = evaluations of the teacher during training, per sample of a batch; CPU seconds = of the training process,
measurements left out (on a GPU they say little: the process waits).
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from chains import Chains, needed_shares, solve
from distil import distil
from evaluation import Evaluation, host_sampler, teacher_evaluations
from recipes import SCALES, Recipe, Scale, changed, recipes
from tables import write
from torch import Tensor, nn
from worlds import MODES, Batches, MixtureWorld, MMDiTWorld, ModesWorld, VideoWorld, World

from opensora_perflow.method.metrics import endpoint_error
from opensora_perflow.training.ema import Ema, decay_of
from opensora_perflow.training.plan_file import windows_of

TEACHER = Path("outputs/few_step/mmdit_teacher.safetensors")
CURVE_POINTS = 15
PAPER_WORLDS, PAPER_SAMPLES = ("mixture", *MODES, "video"), 256
EMA = " (EMA)"
"""After a recipe's name: the average of its weights, by the rule of training/ema.py; without, those of its last step."""


def train(recipe: Recipe, world: World, seed: int, evaluation: Evaluation, scale: Scale) -> dict[str, Any]:
    """Distil one student, and measure it at each of its step counts."""
    # watch=None: this measures for itself, and its teacher's calls are counted.
    config = dict(watch=None, guidance=dict(mode="fixed", scale=world.guidance), **recipe.settings)
    with tempfile.TemporaryDirectory() as folder, teacher_evaluations(world.counted) as samples:
        return _train(recipe, world, seed, evaluation, scale, config, Path(folder), samples)


def _train(
    recipe: Recipe, world: World, seed: int, evaluation: Evaluation, scale: Scale, config: dict[str, Any], folder: Path,
    samples: list[int],
) -> dict[str, Any]:  # fmt: skip
    began, chains, batch = time.process_time(), None, world.batch
    rate, desc = recipe.lr_factor * scale.lr, f"seed {seed}, {recipe.name}"
    if recipe.chains and isinstance(world, MMDiTWorld):
        batch = world.stored(config, folder, recipe.chains, seed + 1000, recipe.further)
        config = changed(config, teacher=dict(stored=str(folder)))
    elif recipe.chains:
        chains = solve(world, folder, recipe.chains, seed + 1000, config, further=recipe.further)
        config = changed(config, teacher=dict(stored=str(chains.folder)))
        batch = partial(_stored_batch, world, chains)
    solved = samples[0]
    if recipe.pilot:
        pilot, loss = _learner(recipe, world, seed, config, scale, batch)[::2]
        for _ in distil(pilot, loss, iterations=recipe.pilot, lr=rate, desc=f"{desc}, pilot", betas=recipe.betas):
            pass
        shares = needed_shares(world, pilot.eval(), chains, windows_of(config["windows"]).edges)
        config = changed(config, draws=dict(shares=shares))
    student, scheduler, loss = _learner(recipe, world, seed, config, scale, batch)
    curve: list[list[float]] = []
    every = max(1, recipe.iterations // CURVE_POINTS)
    trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
    averages = Ema(trained, decay_of(recipe.iterations))
    seconds, began = time.process_time() - began, time.process_time()
    for bar in distil(student, loss, iterations=recipe.iterations, lr=rate, desc=desc, betas=recipe.betas):
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
            rows.append({"sampler": name, "steps": steps, "nfe": steps, **evaluation.row(evaluation.sample(sampler, student))})
    cost = {
        "teacher_calls": (solved if recipe.chains else samples[0]) / scale.batch_size,
        "optimizer_steps": recipe.iterations,
        "train_seconds": seconds,
        "shares": config.get("draws", {}).get("shares"),
    }
    return {"rows": [{**row, **cost} for row in rows], "curve": curve, "cost": cost, "student": student, "scheduler": scheduler}


def _stored_batch(world: World, chains: Chains, size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
    """As World.batch, of a store's chains."""
    return torch.zeros(size, *world.latent_shape, device=world.device), chains.next(size, generator)


def _learner(
    recipe: Recipe, world: World, seed: int, config: dict[str, Any], scale: Scale, batch: Batches
) -> tuple[nn.Module, Any, Callable[[], Tensor]]:
    """A new student, its scheduler, and the loss of a step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student, scheduler = world.learner(recipe.width, config)

    def loss() -> Tensor:
        data, model_args = batch(scale.batch_size, generator)
        return scheduler.training_losses(student, data, model_args)["loss"].mean()

    return student, scheduler, loss


def run_seed(world: World, seed: int, chosen: Sequence[Recipe], scale: Scale) -> dict[str, Any]:
    evaluation = Evaluation.of(world, scale.num_samples, seed)
    rows = []
    for steps in world.teacher_steps:
        x = evaluation.sample(host_sampler(world, steps), world.teacher)
        rows.append({"sampler": world.host_sampler, "steps": steps, "nfe": 2 * steps, **evaluation.row(x)})
    curves = {}
    for recipe in chosen:
        result = train(recipe, world, seed, evaluation, scale)
        rows += result["rows"]
        curves[recipe.name] = result["curve"]
        for row in result["rows"]:
            print(
                f"{world.name}  seed {seed}  {row['sampler']:44} {row['steps']:3d} steps  error {row['endpoint_error']:.4f}  "
                f"energy {row['energy_distance']:.5f}  {world.own_column} {row[world.own_column]:.3f}  "
                f"{row['train_seconds']:.0f} s",
                flush=True,
            )
    endpoints = evaluation.endpoints.cpu()
    return {"seed": seed, "floor": evaluation.floor, "rows": rows, "curves": curves, "endpoints": endpoints}


def make_world(name: str, device: str, open_sora: Path | None, teacher: Path = TEACHER) -> World:
    if name == "mmdit":
        if device != "cpu":
            raise SystemExit("world mmdit runs on a CPU: choose --size cpu or full")
        return MMDiTWorld(open_sora, teacher)
    if name == "stdit3" and open_sora is None:
        raise SystemExit("world stdit3 is Open-Sora's own class: give --open-sora ROOT, a v1.2.0 or v1.3 checkout")
    if name in MODES:
        return ModesWorld(name, MODES[name](), device)
    return MixtureWorld(device) if name == "mixture" else VideoWorld(device, open_sora if name == "stdit3" else None)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", nargs="+", choices=(*SCALES["full"], "stdit3"), help="default: mixture")
    parser.add_argument(
        "--paper",
        action="store_true",
        help=f"all worlds that need no checkout, and at least {PAPER_SAMPLES} samples over all seeds",
    )
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
    for name in args.world or (PAPER_WORLDS if args.paper else ["mixture"]):
        world = make_world(name, "cuda" if args.size == "gpu" else "cpu", args.open_sora, args.teacher)
        scale = SCALES[args.size]["video" if name == "stdit3" else name]
        if args.paper:
            scale = replace(scale, num_samples=max(scale.num_samples, -(-PAPER_SAMPLES // len(args.seeds))))
        chosen = select(recipes_of(world, scale.iterations), args.recipes)
        command = f"python benchmarks/{script} --world {name}" + f" --size {args.size}" * (args.size != "cpu")
        command += " --paper" * args.paper
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
