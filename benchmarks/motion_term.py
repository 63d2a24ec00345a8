"""The demo's student with and without the motion term: the same draws and the same solutions of the teacher for both.

    python benchmarks/motion_term.py [--weights 0 1] [--seeds 0] [--iterations 300] [--reference-steps 64]

Prints one JSON line a student: temporal-difference energy of its samples and of the reference, that of their difference,
endpoint error, energy distance, and for each window the motion that the student points at, as a share of the teacher's.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.demo import run as demo
from opensora_perflow.metrics import endpoint_error, energy_distance, temporal_difference_energy


class Student:
    """A network, its scheduler and optimizer, as the demo makes them."""

    def __init__(self, weight: float, settings: demo.DemoSettings, shared: dict[str, Tensor]) -> None:
        objective = [dict(type="perflow"), dict(type="perflow_motion", weight=weight)] if weight else "perflow"
        guidance = dict(mode="fixed", scale=settings.guidance_scale)
        # Diffused starts: those that a student reaches would be another solution for each of them.
        draws, teacher = dict(starts="diffused", edge_mass=0.5, per_solve=1), dict(steps_per_window=4, solver="euler")
        config = dict(type="perflow", guidance=guidance, teacher=teacher, draws=draws)
        self.scheduler = build_module(dict(config, objective=objective), SCHEDULERS)
        self.network = demo._network(None).train()
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.lr, weight_decay=0.0)
        warmup, total = min(20, settings.iterations), settings.iterations
        self.rate = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / total))
        )
        solve = self.scheduler._solve_teacher

        def solve_once(*inputs: Any) -> Tensor:
            """The first student of a step solves, the others take its solution: their draws are the same."""
            if "solution" not in shared:
                shared["solution"] = solve(*inputs)
            return shared["solution"]

        self.scheduler._solve_teacher = solve_once

    def step(self, latents: Tensor, model_args: dict[str, Tensor]) -> None:
        loss = self.scheduler.training_losses(self.network, latents, model_args)["loss"].mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.rate.step()


def run_seed(settings: demo.DemoSettings, weights: list[float]) -> None:
    torch.manual_seed(settings.seed)
    vae, text_encoder, teacher = demo.TinyVAE().eval(), demo.TinyTextEncoder(), demo._network(None)
    clips = demo._clips(settings)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part) for part in demo.frames_to_tensor(clips.frames).split(8)])
    text_encoder.y_embedder = teacher.y_embedder
    shape = clips.frames.shape[1:4]
    shared: dict[str, Any] = {}
    students = [Student(weight, settings, shared) for weight in weights]
    encoded, generator = text_encoder.encode(clips.captions), torch.Generator().manual_seed(settings.seed + 2)
    for _ in tqdm(range(settings.iterations), desc=f"seed {settings.seed}", unit="step"):
        index = torch.randint(len(latents), (settings.batch_size,), generator=generator)
        model_args = {**{k: v[index] for k, v in encoded.items()}, **demo._sizes(len(index), shape)}
        state = torch.get_rng_state()
        shared.clear()
        for student in students:
            torch.set_rng_state(state)
            student.step(latents[index], model_args)
    batch = demo._sampling_batch(settings, clips.captions, latents.shape[1:], shape)
    path = demo._teacher_path(teacher, text_encoder, batch, settings, students[0].scheduler.config.windows.edges)
    samplers = {f"weight {w:g}": (s.scheduler, s.network.eval()) for w, s in zip(weights, students)}
    samplers["teacher, 4 steps"] = (demo._teacher_sampler(4, settings.guidance_scale), teacher)
    for name, (scheduler, network) in samplers.items():
        inputs = (network, text_encoder, batch.noise, batch.prompts, "cpu")
        with torch.no_grad():
            x = scheduler.sample(*inputs, additional_args=batch.sizes, progress=False)
        reference = path.states[-1]
        row = {
            "seed": settings.seed,
            "sampler": name,
            "motion": temporal_difference_energy(x),
            "reference_motion": temporal_difference_energy(reference),
            "motion_error": temporal_difference_energy(x - reference),
            "endpoint_error": endpoint_error(x, reference),
            "energy_distance": energy_distance(x, reference),
        }
        if network is not teacher:
            windows = demo._window_errors(scheduler, teacher, network, text_encoder, batch, path)
            row["window_motion"] = [w["motion"]["student"] / w["motion"]["teacher"] for w in windows]
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--reference-steps", type=int, default=64, help="guided steps of the reference, a multiple of 4")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    demo.REFERENCE_STEPS = args.reference_steps
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            run_seed(demo.DemoSettings(out=Path(folder), seed=seed, iterations=args.iterations), args.weights)


if __name__ == "__main__":
    main()
