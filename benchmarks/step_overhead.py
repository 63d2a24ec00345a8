"""What a sampling step costs outside the network, next to one evaluation of STDiT3-XL/2 at 144p x 17 frames.

    python benchmarks/step_overhead.py --open-sora ../Open-Sora [--json out.json]

Needs the host's Python packages and 8 GB of memory; minutes on a CPU. The network's weights are random: time does not depend on
them. The same sampler runs with the real network and with one that returns at once: the second gives the cost of everything
else. The host's own rflow sampler is measured in the same way.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

LATENT = (1, 4, 5, 18, 32)  # 17 frames of 144 x 256, v1.2's VAE


class Nothing(nn.Module):
    """Takes what STDiT3 takes and returns at once."""

    def __init__(self) -> None:
        super().__init__()
        self.output = torch.zeros(2 * LATENT[0], 2 * LATENT[1], *LATENT[2:])

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Any = None, x_mask: Any = None, **kwargs: Any) -> Tensor:
        return self.output


def seconds_per_step(scheduler: dict[str, Any], network: nn.Module, text_encoder: Any, steps: int, repeats: int) -> float:
    """Median over repeats of the wall time of a whole sampling run, divided by its steps."""
    from opensora.registry import SCHEDULERS, build_module

    built = build_module(dict(scheduler, num_sampling_steps=steps, cfg_scale=7.0, use_timestep_transform=True), SCHEDULERS)
    sizes = dict(height=144.0, width=256.0, num_frames=17.0, ar=0.5625, fps=24.0)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        built.sample(
            network, text_encoder, torch.randn(LATENT), ["a prompt"], "cpu",
            additional_args={key: torch.full((1,), value) for key, value in sizes.items()},
            mask=torch.ones(1, LATENT[2]), progress=False,
        )  # fmt: skip
        times.append((time.perf_counter() - start) / steps)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-sora", type=Path, required=True, help="root of an Open-Sora v1.2.0 or v1.3 checkout")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    sys.path.insert(0, str(args.open_sora.resolve()))

    import opensora_perflow  # noqa: F401  registers perflow
    from opensora_perflow import portable

    portable.activate()
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    torch.manual_seed(0)
    text = dict(y=torch.randn(1, 1, 300, 4096), mask=torch.ones(1, 300, dtype=torch.long))
    null = torch.zeros(1, 1, 300, 4096)
    text_encoder = SimpleNamespace(encode=lambda *a, **k: dict(text), null=lambda n: null)
    if (args.open_sora / "scripts" / "inference_i2v.py").is_file():
        text_encoder.tokenize_fn = lambda prompts: dict(input_ids=prompts)
    config = STDiT3Config(depth=28, hidden_size=1152, patch_size=(1, 2, 2), num_heads=16, qk_norm=True, in_channels=4)
    with torch.no_grad():
        rows = {}
        for name, scheduler in (("rflow", dict(type="rflow")), ("perflow", dict(type="perflow"))):
            rows[name] = seconds_per_step(scheduler, Nothing(), text_encoder, steps=100, repeats=9)
        network = STDiT3(config).eval()
        network_seconds = seconds_per_step(dict(type="perflow"), network, text_encoder, steps=1, repeats=2)
    result = {
        "network_seconds": network_seconds,
        "outside_seconds": rows,
        "share": {name: seconds / network_seconds for name, seconds in rows.items()},
        "threads": torch.get_num_threads(),
    }
    print(f"one guided evaluation of STDiT3-XL/2, 144p x 17 frames: {network_seconds:.2f} s on {result['threads']} threads")
    for name, seconds in rows.items():
        print(f"{name}: {seconds * 1e3:.2f} ms a step outside the network, {seconds / network_seconds:.3%} of it")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
