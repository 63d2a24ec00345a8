"""Students that are adapters (LoRA) beside full ones: endpoint error of the tiny video model at equal CPU seconds.

    python benchmarks/lora.py [--steps 100] [--seeds 0 1 2] [--students NAME ...] [--json out.json]

Each seed trains a full student first. Every student with adapters then gets as many steps as take the full one's CPU seconds,
by the cost of its first five. Recipe: the scheduler's defaults with 4 windows and guidance folded in. Error: root mean square
distance after 4 steps to where 128 guided Euler steps of the teacher carry the same noise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from distil import distil
from evaluation import Evaluation, host_sampler
from few_step import set_up_process
from recipes import OURS, SCALES
from torch import Tensor, nn
from worlds import VideoWorld

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.hosts.v1.lora import LoRA, add_adapters
from opensora_perflow.method.metrics import endpoint_error

SCALE = SCALES["cpu"]["video"]
BLOCKS = ("attn.qkv", "attn.proj", "q_linear", "kv_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2")
TRIAL = 5


@dataclass(frozen=True)
class Student:
    """lora: None for a full student. lr: Peak learning rate."""

    lora: LoRA | None
    lr: float


STUDENTS = {
    "full": Student(None, SCALE.lr),
    "rank 16": Student(LoRA(16), 2e-3),
    "rank 64": Student(LoRA(64), 1e-3),
    "rank 16, blocks alone": Student(LoRA(16, targets=BLOCKS), 2e-3),
    "rank 64, blocks alone": Student(LoRA(64, targets=BLOCKS), 1e-3),
}
"""The second entry is the config's default."""


def train(
    chosen: Student, world: VideoWorld, evaluation: Evaluation, seed: int, steps: int, seconds: float | None
) -> dict[str, Any]:
    """One student's row. `seconds`: CPU time that it may take; None: as many as `steps` take."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = dict(type="perflow", watch=None, guidance=dict(mode="fixed", scale=world.guidance), draws=dict(seed=seed), **OURS)

    def begin() -> tuple[nn.Module, Any, Callable[[], Tensor]]:
        student = world.student(None)
        if chosen.lora is not None:
            add_adapters(student, chosen.lora)
        scheduler = build_module(config, SCHEDULERS)

        def loss() -> Tensor:
            data, model_args = world.batch(SCALE.batch_size, generator)
            return scheduler.training_losses(student, data, model_args)["loss"].mean()

        return student, scheduler, loss

    if seconds is not None:
        student, _, loss = begin()
        for _ in distil(student, loss, iterations=1, lr=0.0, desc="first"):  # makes the teacher
            pass
        began = time.process_time()
        for _ in distil(student, loss, iterations=TRIAL, lr=0.0, desc="trial"):
            pass
        steps = max(1, round(seconds / ((time.process_time() - began) / TRIAL)))
    generator.manual_seed(seed)
    student, scheduler, loss = begin()
    began = time.process_time()
    for _ in distil(student, loss, iterations=steps, lr=chosen.lr, desc=str(chosen)):
        pass
    spent = time.process_time() - began
    student.eval()
    error = endpoint_error(evaluation.sample(scheduler, student), evaluation.endpoints)
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    return {"error": error, "seconds": spent, "steps": steps, "trained": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of the full student (default 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--students", nargs="+", choices=tuple(STUDENTS), default=["full", "rank 16"], help="full comes first")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    set_up_process()
    world, rows = VideoWorld(), []
    print("| seed | student | trained parameters | steps | CPU seconds | error | over full |\n|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        evaluation = Evaluation.of(world, SCALE.num_samples, seed, floor=False, reference_steps=128)
        untrained = endpoint_error(evaluation.sample(host_sampler(world, 4), world.teacher), evaluation.endpoints)
        print(f"| {seed} | teacher, 4 guided steps | | | | {untrained:.4f} | |", flush=True)
        full: dict[str, Any] | None = None
        for name in args.students:
            row = train(STUDENTS[name], world, evaluation, seed, args.steps, None if full is None else full["seconds"])
            full = full or row
            over = row["error"] / full["error"]
            rows.append({"seed": seed, "student": name, "over_full": over, **row})
            cost = f"{row['trained']:,} | {row['steps']} | {row['seconds']:.0f}"
            print(f"| {seed} | {name} | {cost} | {row['error']:.4f} | {over:.2f} |", flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
