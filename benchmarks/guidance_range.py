"""One student for a range of guidance scales against one student for each scale, on the mixture of worlds/mixture.py.

    python benchmarks/guidance_range.py [--iterations 1000] [--seeds 0 1] [--out FOLDER]

Mode fixed is trained once for each scale, mode range once for all of them, for as many steps and for twice as many. All take
4 evaluations a sample. Endpoint error = root mean square distance from where 512 guided Euler steps carry the same noise. The
last rows are the range student's error at a scale when it is told another one, the middle of the range.

Writes guidance_range.json and guidance_range.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import torch
from distil import distil
from torch import Tensor, nn

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.atomic import replacing
from opensora_perflow.method.metrics import endpoint_error, energy_distance
from opensora_perflow.worlds.mixture import NUM_CLASSES, ClassText, Mixture, MixtureNetwork

SCALES = (1.0, 2.0, 4.0)
BATCH_SIZE, WIDTH, LR, REFERENCE_STEPS = 256, 128, 2e-3, 512


def build(**settings: Any) -> Any:
    return build_module(dict(type="perflow", **settings), SCHEDULERS)


def train(mixture: Mixture, seed: int, iterations: int, name: str, guidance: dict[str, Any]) -> nn.Module:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student, text, scheduler = MixtureNetwork(mixture, WIDTH), ClassText(), build(windows=4, guidance=guidance)

    def loss() -> Tensor:
        class_idx = torch.randint(NUM_CLASSES, (BATCH_SIZE,), generator=generator)
        return scheduler.training_losses(student, mixture.draw(class_idx, generator), text.of(class_idx))["loss"].mean()

    for _ in distil(student, loss, iterations=iterations, lr=LR, desc=f"seed {seed}, {name}"):
        pass
    return student.eval()


def run_seed(seed: int, iterations: int, num_samples: int) -> list[dict[str, Any]]:
    mixture, text = Mixture.standard(), ClassText()
    teacher = MixtureNetwork(mixture, width=1).eval()
    noise = torch.randn(num_samples, 16, 1, 1, 1, generator=torch.Generator().manual_seed(1000 + seed))
    prompts = [f"class {i % NUM_CLASSES}" for i in range(num_samples)]

    @torch.no_grad()
    def sample(scheduler: Any, network: nn.Module, scale: float | None = None) -> Tensor:
        return scheduler.sample(network, text, noise, prompts, "cpu", guidance_scale=scale, progress=False)

    ends = {scale: sample(build(windows=1, num_sampling_steps=REFERENCE_STEPS), teacher, scale) for scale in SCALES}
    rows = []

    def add(name: str, scale: float, x: Tensor) -> None:
        errors = {"endpoint_error": endpoint_error(x, ends[scale]), "energy_distance": energy_distance(x, ends[scale])}
        rows.append({"student": name, "scale": scale, **errors})

    for scale in SCALES:
        guidance = dict(mode="fixed", scale=scale)
        add(
            "fixed, one for each scale",
            scale,
            sample(build(guidance=guidance), train(mixture, seed, iterations, "fixed", guidance)),
        )
        add("teacher, 4 guided steps (8 evaluations)", scale, sample(build(windows=1, num_sampling_steps=4), teacher, scale))
    guidance = dict(mode="range", scale=(SCALES[0], SCALES[-1]))
    for name, steps in (("range, as many steps", iterations), ("range, twice as many", 2 * iterations)):
        student, scheduler = train(mixture, seed, steps, name, guidance), build(guidance=guidance)
        for scale in SCALES:
            add(name, scale, sample(scheduler, student, scale))
            add(f"{name}, told {sum(guidance['scale']) / 2:g}", scale, sample(scheduler, student, sum(guidance["scale"]) / 2))
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| student | " + " | ".join(f"scale {s:g}" for s in SCALES) + " |", "|---" * (len(SCALES) + 1) + "|"]
    for name in dict.fromkeys(row["student"] for row in rows):
        cells = []
        for scale in SCALES:
            found = [r for r in rows if (r["student"], r["scale"]) == (name, scale)]
            error, distance = (statistics.mean(r[key] for r in found) for key in ("endpoint_error", "energy_distance"))
            cells.append(f"{error:.4f} / {distance:.5f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--num-samples", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("outputs/guidance_range"))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = [row | {"seed": seed} for seed in args.seeds for row in run_seed(seed, args.iterations, args.num_samples)]
    table = f"Endpoint error / energy distance, mean of seeds {args.seeds}:\n\n{markdown(rows)}"
    print(table)
    for name, content in {"guidance_range.json": json.dumps(rows, indent=1), "guidance_range.md": table + "\n"}.items():
        with replacing(args.out / name) as temporary:
            temporary.write_text(content)


if __name__ == "__main__":
    main()
