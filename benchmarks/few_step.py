"""Few-step students against their teacher, in one process: endpoint error, distribution and cost, with several seeds.

    python benchmarks/few_step.py [--full] [--ablations] [--out FOLDER] [--seeds 0 1 2] [--recipes NAME ...]

Part (a): the 16-dimensional mixture of opensora_perflow/demo/mixture.py (24 modes, 4 classes, closed-form teacher, guidance
2), with an MLP as student. Everything goes through the PeRFlow object, as Open-Sora's scripts go: `training_losses` distils,
`sample` samples; the host's rflow sampler is PeRFlow with one window and CFG (benchmarks/sampler_parity.py).

Writes few_step.json, few_step.md and few_step.png. Every seed draws new training data, new student weights and new noise for
evaluation; the mixture stays. Columns: NFE = network evaluations a sample (a guided step is 2); endpoint error = root mean
square distance from where 512 guided Euler steps carry the same noise; energy distance to those endpoints (unbiased, so
about 0 for equal distributions; the floor is that of two independent sets of the teacher's); same mode = share of samples
whose nearest mode is the endpoint's; teacher calls = evaluations of the teacher during training, per sample of a batch.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.demo.mixture import NUM_CLASSES, ClassText, Mixture, MixtureNetwork
from opensora_perflow.demo.plots import save_figure
from opensora_perflow.metrics import endpoint_error, energy_distance

GUIDANCE = 2.0
REFERENCE_STEPS = 512
BATCH_SIZE, PEAK_LR, WARMUP = 256, 2e-3, 50


@dataclass(frozen=True)
class Recipe:
    """A student: how it is trained, and with how many steps it is sampled."""

    name: str
    settings: dict[str, Any]
    """Scheduler config besides type and guidance."""
    iterations: int
    width: int = 128
    steps: tuple[int, ...] = (4, 8, 16)


REFERENCE = dict(windows=4, teacher=dict(steps_per_window=8))
INSTAFLOW = dict(windows=1, teacher=dict(steps_per_window=32))
EDGE = dict(edge_mass=0.5)
OURS = dict(
    windows=4,
    teacher=dict(steps_per_window=2, solver="heun"),
    draws=dict(**EDGE, starts="student", per_solve=2),
)


def recipes(iterations: int) -> list[Recipe]:
    """The students that are compared, and what each change contributes on the way from the reference recipe to ours."""
    return [
        Recipe("reference recipe", REFERENCE, iterations),
        Recipe("K=1 reflow (InstaFlow), as many calls", INSTAFLOW, iterations // 4, steps=(1, 4, 8, 16)),
        Recipe("reference + half of the times at the edge", dict(REFERENCE, draws=EDGE), iterations),
        Recipe("  + student starts", dict(REFERENCE, draws=dict(**EDGE, starts="student")), iterations),
        Recipe("ours (+ 2 Heun steps, 2 times a solve)", OURS, iterations),
        Recipe("ours, the reference's teacher calls", OURS, 2 * iterations),
        Recipe("ours, 1/4 of its teacher calls", OURS, iterations // 2),
        Recipe("ours, 1/16 of its teacher calls", OURS, iterations // 8),
        Recipe("ours, twice as wide, 3/2 as long", OURS, 3 * iterations // 2, width=256),
    ]


def ablations(iterations: int) -> list[Recipe]:
    """One change to ours at a time, everything else alike."""

    def change(name: str, settings: dict[str, Any] | None = None, **draws: Any) -> Recipe:
        return Recipe(name, {**OURS, **(settings or {}), "draws": {**OURS["draws"], **draws}}, iterations)

    return [
        change("ours"),
        *(change(f"edge_mass={mass}", edge_mass=mass) for mass in (0.0, 0.25, 0.75, 0.9)),
        change("edge_mass=1, per_solve=1", edge_mass=1.0, per_solve=1),
        change("beta (5, 1), no edge mass", distribution="beta", beta=(5, 1), edge_mass=0.0),
        change("starts=diffused", starts="diffused"),
        change("starts=mixed", starts="mixed"),
        change("per_solve=1", per_solve=1),
        change("per_solve=4", per_solve=4),
        change("teacher: 8 Euler steps", dict(teacher=dict(steps_per_window=8))),
        change("teacher: 4 Euler steps", dict(teacher=dict(steps_per_window=4))),
        change("teacher: 1 Heun step", dict(teacher=dict(steps_per_window=1, solver="heun"))),
        change("teacher: 4 Heun steps", dict(teacher=dict(steps_per_window=4, solver="heun"))),
        change("+ 0.1 direction", dict(objective=["perflow", dict(type="perflow_direction", weight=0.1)])),
        change("phased", dict(objective="perflow_phased")),
        change("perflow + phased", dict(objective=["perflow", "perflow_phased"])),
        change("pseudo-Huber", dict(objective="perflow_huber")),
        change("consistency, student target", dict(objective="perflow_consistency")),
        change("consistency, solution target", dict(objective=dict(type="perflow_consistency", target="solution"))),
    ]


@dataclass
class Evaluation:
    """Noise and prompts that every sampler gets, and where the fine teacher carries them."""

    noise: Tensor
    prompts: list[str]
    endpoints: Tensor
    floor: float
    text: ClassText = field(default_factory=ClassText)

    @classmethod
    def of(cls, teacher: nn.Module, num_samples: int, seed: int) -> Evaluation:
        generator = torch.Generator().manual_seed(1000 + seed)
        noise, other = torch.randn(2, num_samples, 16, 1, 1, 1, generator=generator)
        prompts = [f"class {i % NUM_CLASSES}" for i in range(num_samples)]
        evaluation = cls(noise, prompts, noise, 0.0)
        evaluation.endpoints = evaluation.sample(host_sampler(REFERENCE_STEPS), teacher)
        again = evaluation.sample(host_sampler(REFERENCE_STEPS), teacher, other)
        evaluation.floor = energy_distance(again, evaluation.endpoints)
        return evaluation

    @torch.no_grad()
    def sample(self, scheduler: Any, network: nn.Module, noise: Tensor | None = None) -> Tensor:
        z = self.noise if noise is None else noise
        return scheduler.sample(network, self.text, z, self.prompts, "cpu", progress=False)

    def metrics(self, x: Tensor, mixture: Mixture) -> dict[str, float]:
        same = mixture.nearest_mode(x) == mixture.nearest_mode(self.endpoints)
        return {
            "endpoint_error": endpoint_error(x, self.endpoints),
            "energy_distance": energy_distance(x, self.endpoints),
            "same_mode": same.double().mean().item(),
        }


def host_sampler(steps: int) -> Any:
    return build_module(dict(type="perflow", windows=1, num_sampling_steps=steps, cfg_scale=GUIDANCE), SCHEDULERS)


class Calls:
    """Counts a network's evaluations in samples."""

    def __init__(self, network: nn.Module) -> None:
        self.samples = 0
        network.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.samples += len(inputs[0])


def train(recipe: Recipe, mixture: Mixture, seed: int, evaluation: Evaluation) -> dict[str, Any]:
    """Distil one student, and measure it at each of its step counts."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student, text = MixtureNetwork(mixture, recipe.width).train(), ClassText()
    config = dict(type="perflow", guidance=dict(mode="fixed", scale=GUIDANCE), **recipe.settings)
    scheduler = build_module(config, SCHEDULERS)
    calls = Calls(scheduler._teacher_of(student))
    optimizer = torch.optim.Adam(student.parameters(), lr=PEAK_LR)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * i / recipe.iterations))
    )
    seconds, curve = 0.0, []
    for step in range(recipe.iterations):
        began = time.perf_counter()
        class_idx = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)
        data = mixture.draw(class_idx, generator)
        loss = scheduler.training_losses(student, data, text.of(class_idx))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        rate.step()
        seconds += time.perf_counter() - began
        if (step + 1) % max(1, recipe.iterations // 20) == 0:
            error = endpoint_error(evaluation.sample(scheduler, student), evaluation.endpoints)
            curve.append([step + 1, calls.samples / BATCH_SIZE, seconds, error])
    student.eval()
    rows = []
    for steps in recipe.steps:
        sampler = build_module(dict(config, num_sampling_steps=steps), SCHEDULERS)
        measured = evaluation.metrics(evaluation.sample(sampler, student), mixture)
        rows.append({"sampler": recipe.name, "steps": steps, "nfe": steps, **measured})
    cost = {"teacher_calls": calls.samples / BATCH_SIZE, "optimizer_steps": recipe.iterations, "train_seconds": seconds}
    return {"rows": [{**row, **cost} for row in rows], "curve": curve}


def run_seed(mixture: Mixture, seed: int, chosen: Iterable[Recipe], num_samples: int) -> dict[str, Any]:
    teacher = MixtureNetwork(mixture, width=1).eval()  # untrained, the MLP adds nothing at any width
    evaluation = Evaluation.of(teacher, num_samples, seed)
    rows = []
    for steps in (4, 8, 16, 30):
        x = evaluation.sample(host_sampler(steps), teacher)
        rows.append({"sampler": "host's rflow", "steps": steps, "nfe": 2 * steps, **evaluation.metrics(x, mixture)})
    curves = {}
    for recipe in chosen:
        result = train(recipe, mixture, seed, evaluation)
        rows += result["rows"]
        curves[recipe.name] = result["curve"]
        for row in result["rows"]:
            print(
                f"seed {seed}  {recipe.name:44} {row['steps']:3d} steps  error {row['endpoint_error']:.4f}  "
                f"energy {row['energy_distance']:.5f}  {row['train_seconds']:.0f} s",
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
        for key in ("endpoint_error", "energy_distance", "same_mode", "teacher_calls", "optimizer_steps", "train_seconds"):
            if key in rows[0]:
                values = [row[key] for row in rows]
                merged[key] = statistics.mean(values)
                merged[key + "_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        summary.append(merged)
    return summary


def markdown(summary: list[dict[str, Any]], floors: list[float], command: str) -> str:
    """The table, as benchmarks/README.md shows it."""
    spread = statistics.stdev(floors) if len(floors) > 1 else 0.0
    lines = [
        f"`{command}`",
        "",
        f"Mean and standard deviation of {len(floors)} seeds. Energy distance in 1/1000; two independent sets of the teacher's "
        f"samples are {1000 * statistics.mean(floors):.2f} ± {1000 * spread:.2f} apart.",
        "",
        "| sampler | NFE | endpoint error | energy distance | same mode | teacher calls | optimizer steps | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        cost = "| | | |"
        if "teacher_calls" in row:
            cost = f"| {row['teacher_calls']:.0f} | {row['optimizer_steps']:.0f} | {row['train_seconds']:.0f} |"
        lines.append(
            f"| {row['sampler']}, {row['steps']} steps | {row['nfe']} "
            f"| {row['endpoint_error']:.4f} ± {row['endpoint_error_std']:.4f} "
            f"| {1000 * row['energy_distance']:.2f} ± {1000 * row['energy_distance_std']:.2f} "
            f"| {row['same_mode']:.1%} {cost}"
        )
    return "\n".join(lines) + "\n"


def figure(results: list[dict[str, Any]], summary: list[dict[str, Any]], path: Path) -> None:
    """Error against NFE, and error while training against what the teacher was asked."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="4 times the training steps")
    parser.add_argument("--ablations", action="store_true", help="one change to our settings at a time, instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/few_step"), help="folder (default outputs/few_step)")
    parser.add_argument("--recipes", nargs="+", help="only the recipes whose names contain one of these")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small: more threads wait for each other
    logging.getLogger("opensora_perflow").setLevel(logging.WARNING)
    iterations = 8000 if args.full else 2000
    chosen = ablations(iterations // 2) if args.ablations else recipes(iterations)
    chosen = [recipe for recipe in chosen if not args.recipes or any(part in recipe.name for part in args.recipes)]
    command = "python benchmarks/few_step.py" + " --full" * args.full + " --ablations" * args.ablations
    command += "" if args.seeds == [0, 1, 2] else f" --seeds {' '.join(map(str, args.seeds))}"
    results = []
    for seed in args.seeds:
        results.append(run_seed(Mixture.standard(), seed, chosen, num_samples=4096 if args.full else 2048))
        # Written after every seed: a run that is stopped leaves the seeds that it finished.
        summary, floors = summarise(results), [result["floor"] for result in results]
        text = markdown(summary, floors, command)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "few_step.json").write_text(
            json.dumps({"command": command, "summary": summary, "seeds": results}, indent=1)
        )
        (args.out / "few_step.md").write_text(text)
        figure(results, summary, args.out / "few_step.png")
    print(text)


if __name__ == "__main__":
    main()
