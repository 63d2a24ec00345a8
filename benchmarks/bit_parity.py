"""Losses, gradients, samples and log lines of this tree and of another commit, compared bit for bit.

    python benchmarks/bit_parity.py --against COMMIT        # some 60 configurations on small networks, half a minute

For changes that must not change a result. Prints each configuration that differs, with its relative differences; the exit
status is their number. Seeds: 0 (network), 5 (global draws of training), 3 and 4 (noise and draws of sampling).
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
FIXED = dict(guidance=dict(mode="fixed", scale=3.0))
RANGE = dict(guidance=dict(mode="range", scale=(1.0, 9.0)))
WARP = dict(use_timestep_transform=True, transform="v1.3")
MASK = torch.tensor([[True] * 5, [False] + [True] * 4])
TIMES = torch.tensor([800.0, 300.0])
EDITS = torch.tensor([[0.0, 0.4, 1, 1, 1], [0.5, 0, 0.25, 1, 1]])
DROPS = dict(drop_condition=dict(null=1.0, cond=1.0, text=1.0, keep=1.0), x_cond_weight=0.5)

TRAINING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "defaults": ("tiny", {}, {}),
    "fixed": ("tiny", FIXED, {}),
    "range": ("tiny", RANGE, {}),
    "reference recipe": (
        "tiny",
        dict(teacher=dict(steps_per_window=8, solver="euler"), draws=dict(starts="diffused", edge_mass=0.0, per_solve=1)),
        {},
    ),
    "masks": ("tiny", FIXED, dict(mask=MASK)),
    "masks, sync": ("tiny", {}, dict(mask=MASK)),
    "warp of 1.3": ("tiny", {**FIXED, **WARP}, {}),
    "warp of 1.2": ("tiny", dict(use_timestep_transform=True, transform="v1.2"), {}),
    "a given time": ("tiny", FIXED, dict(t=TIMES)),
    "objectives": ("tiny", dict(objective=["perflow", "perflow_phased", dict(type="perflow_direction", weight=0.1)]), {}),
    "consistency": ("tiny", dict(objective="perflow_consistency"), {}),
    "consistency, solution": ("tiny", dict(objective=dict(type="perflow_consistency", target="solution")), {}),
    "references": ("references", FIXED, dict(mask_index=[0, 2])),
    "references, sync": ("references", {}, dict(mask_index=[0])),
    "references, none": ("references", {}, dict(mask_index=[])),
    "references, dropped": ("references", DROPS, dict(mask_index=[0])),
    "references, image scale": (
        "references", dict(guidance=dict(mode="fixed", scale=4.0, image_scale=2.0)), dict(mask_index=[1])
    ),
    "epsilon": ("epsilon", dict(path="ddpm"), {}),
    "epsilon, masks": ("epsilon", dict(path="ddpm", **FIXED), dict(mask=MASK)),
    "epsilon, diff_eps": ("epsilon", dict(path="ddpm", prediction="diff_eps", **FIXED), {}),
    "epsilon, velocity": ("epsilon", dict(path="ddpm", prediction="velocity", **FIXED), {}),
    "epsilon, its script's time": ("epsilon", dict(path="ddpm"), dict(third=torch.tensor([800, 299]))),
    "epsilon, planned": ("epsilon", dict(path="ddpm", windows=[1, 0.6, 0.2, 0]), dict(third=torch.tensor([800, 299]))),
    "degraded data": ("tiny", dict(draws=dict(starts="diffused")), dict(x_gt=1.0, noise_disable_threshold=500.0)),
    "weights a timestep": ("tiny", FIXED, dict(weights=torch.linspace(0.1, 2.0, 1000))),
    "text dropout": ("tiny", {}, dict(text_uncond_prob=0.7)),
    "uneven windows": ("tiny", dict(windows=[1.0, 0.8, 0.3, 0], **FIXED), {}),
    "a scale a window": ("tiny", dict(guidance=dict(mode="fixed", scale=[9, 7, 5, 3])), {}),
    "a sampling scale a window": ("tiny", dict(cfg_scale=[9, 7, 5, 3]), {}),
    "flaw fix": ("tiny", dict(use_flaw_fix=True, cfg_scale=7.5), {}),
    "overlap and grids": ("tiny", dict(draws=dict(overlap=0.75, grids=[5, 6]), **FIXED), {}),
    "four times a solve": ("tiny", dict(draws=dict(per_solve=4), **FIXED), {}),
    "edges alone": ("tiny", dict(draws=dict(edge_mass=1.0), **FIXED), {}),
    "half at the edge": ("tiny", dict(draws=dict(edge_mass=0.5, per_solve=1), **FIXED), {}),
    "whole timesteps": ("tiny", dict(use_discrete_timesteps=True, **FIXED), {}),
    "watch": ("tiny", dict(watch=dict(every=4), **FIXED), dict(steps=9)),
    "watch, masks, warp": ("tiny", dict(watch=dict(every=4), **WARP), dict(steps=9, mask=MASK)),
    "watch, range": ("tiny", dict(watch=dict(every=4), **RANGE), dict(steps=9)),
    "curriculum": (
        "tiny", dict(windows=4, curriculum=dict(windows=[4, 2], advance=dict(min_steps=1, max_steps=25))), dict(steps=30)
    ),
    "curriculum, previous": (
        "tiny",
        dict(windows=4, curriculum=dict(windows=[4, 2], teacher="previous", advance=dict(min_steps=1, max_steps=25)), **FIXED),
        dict(steps=30),
    ),
}  # fmt: skip
"""Name -> network, scheduler config, arguments of training_losses (`third`: 1.0's and 1.1's t)."""

SAMPLING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sync": ("tiny", {}, {}),
    "30 steps": ("tiny", dict(num_sampling_steps=30), {}),
    "fixed": ("tiny", FIXED, {}),
    "range": ("tiny", RANGE, dict(guidance_scale=[2, 3, 4, 5])),
    "warp": ("tiny", dict(transform_scale=2.0, **WARP), {}),
    "edits": ("tiny", {}, dict(mask=EDITS)),
    "oscillation": ("tiny", dict(use_oscillation_guidance=True, force_num=1, num_sampling_steps=8), {}),
    "negative prompts": ("tiny", {}, dict(neg_prompts=["a blue square"] * 2)),
    "references": ("references", {}, dict(mask_index=[0])),
    "references, image ramp": (
        "references", dict(scale_image_weight=True, use_flaw_fix=True), dict(mask_index=[0], image_cfg_scale=3.0)
    ),
    "references, sdedit": ("references", {}, dict(mask_index=[0], use_sdedit=True)),
    "references, fixed": ("references", FIXED, dict(mask_index=[0, 4])),
    "epsilon": ("epsilon", dict(path="ddpm", num_sampling_steps=30, cfg_channel=3), {}),
    "epsilon, edits": ("epsilon", dict(path="ddpm", **FIXED), dict(mask=EDITS)),
    "long video": ("tiny", dict(long_video=dict(edit=0.3, frames=2)), dict(mask=torch.tensor([[0.0, 0, 1, 1, 1]] * 2))),
    "uniform grid": ("tiny", dict(sampling_grid="uniform", num_sampling_steps=5), {}),
    "whole timesteps": ("tiny", dict(use_discrete_timesteps=True, num_sampling_steps=7), {}),
}  # fmt: skip
"""Name -> network, scheduler config, arguments of sample."""


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def measure() -> dict[str, Any]:
    """Results of every configuration with the package and the test networks that are on the path."""
    from networks import PROMPTS, Epsilon, Reference13, batch, sizes, text_encoder, tiny_network

    from opensora_perflow import PeRFlow

    networks = {"tiny": tiny_network, "references": Reference13, "epsilon": Epsilon}
    kept, logger = _Lines(), logging.getLogger("opensora_perflow")
    logger.setLevel(logging.INFO)
    logger.addHandler(kept)
    logger.propagate = False

    def train(network: str, config: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
        torch.manual_seed(0)
        student = networks[network]().train()
        x, args = batch(student)
        scheduler = PeRFlow(**{"watch": None, **config})
        torch.manual_seed(5)
        kept.lines.clear()
        call = dict(call)
        steps, third = call.pop("steps", 3), call.pop("third", None)
        if "x_gt" in call:
            call["x_gt"] = x + call["x_gt"]
        optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=1e-3)
        result: dict[str, Any] = {"losses": [], "gradients": []}
        for _ in range(steps):
            given = (x, args) if third is None else (x, third, args)
            loss = scheduler.training_losses(student, *given, **call)["loss"]
            optimizer.zero_grad()
            loss.mean().backward()
            result["losses"].append(loss.detach().clone())
            result["gradients"].append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
            optimizer.step()
        return {**result, "lines": list(kept.lines)}

    def sample(network: str, config: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
        torch.manual_seed(0)
        student = networks[network]().eval()
        torch.manual_seed(3)
        z, z_cond = torch.randn(2, 2, 4, 5, 4, 4)
        named = {**call, **({"z_cond": z_cond} if "mask_index" in call else {})}
        torch.manual_seed(4)
        with torch.no_grad():
            scheduler = PeRFlow(watch=None, **config)
            text = text_encoder(student)
            clip = scheduler.sample(student, text, z, PROMPTS, "cpu", additional_args=sizes(2), progress=False, **named)
        return {"clip": [clip]}

    rows = {f"training, {name}": train(*case) for name, case in TRAINING.items()}
    return {**rows, **{f"sampling, {name}": sample(*case) for name, case in SAMPLING.items()}}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, str]:
    """Configuration -> what differs, of those that are not equal to the last bit."""
    found = {}
    for name, result in ours.items():
        other, parts = theirs[name], []
        for key, values in result.items():
            same = [torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(values, other[key])]
            if len(values) != len(other[key]) or not all(same):
                tensors = [(a, b) for a, b in zip(values, other[key]) if isinstance(a, Tensor)]
                parts.append(f"{key} {max(((a - b).norm() / b.norm()).item() for a, b in tensors):.1e}" if tensors else key)
        if parts:
            found[name] = ", ".join(parts)
    return found


def results_of(tree: Path, out: Path) -> dict[str, Any]:
    """`measure` in a process of its own, with a tree's package and test networks."""
    path = os.pathsep.join([str(tree), str(tree / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(Path(__file__).resolve()), "--write", str(out)], env=environment, check=True)
    return torch.load(out, weights_only=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", default="HEAD", help="commit to compare this tree with (default HEAD)")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write is not None:
        torch.set_num_threads(1)
        torch.save(measure(), args.write)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(other), args.against], check=True)
        try:
            found = differences(*(results_of(tree, Path(folder) / f"{i}.pt") for i, tree in enumerate((ROOT, other))))
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(other)], check=True)
    for name, what in found.items():
        print(f"{name}: {what}")
    count = len(TRAINING) + len(SAMPLING)
    print(f"{count - len(found)} of {count} configurations are equal to {args.against} to the last bit")
    return min(len(found), 125)


if __name__ == "__main__":
    sys.exit(main())
