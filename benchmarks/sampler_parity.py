"""Is `perflow` with uniform windows and CFG the host's own sampler? Same seed, same network, in float32.

    python benchmarks/sampler_parity.py --open-sora ../Open-Sora [--json out.json]

Needs the host's Python packages (docs/hosts.md); about a minute on a CPU. Prints one row per case with the largest absolute
difference, and exits with 1 if one exceeds 1e-5. The network is the real STDiT3 class, small and with random weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
"""float32: the host rounds its warped times to float32 between operations, this package once (some 1e-7 of the timestep)."""


def build_network(seed: int) -> nn.Module:
    """The real STDiT3 of the installed host, hidden 96, depth 2, with weights large enough to matter."""
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    torch.manual_seed(seed)
    config = STDiT3Config(
        hidden_size=96, depth=2, num_heads=4, in_channels=4, caption_channels=32, model_max_length=10, qk_norm=True,
        class_dropout_prob=0.0, enable_flash_attn=False, enable_layernorm_kernel=False,
    )  # fmt: skip
    network = STDiT3(config).eval()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
    return network


def cases(image_conditioning: bool) -> list[dict[str, Any]]:
    """Scheduler settings, number of windows and call arguments of every comparison."""
    rows = []
    for steps, windows in ((4, 4), (8, 4), (30, 1), (30, 10)):
        for transform in (False, True):
            for mask in (None, "ones", "edit 0"):
                rows.append(dict(steps=steps, windows=windows, settings=dict(use_timestep_transform=transform), mask=mask))
        rows.append(
            dict(steps=steps, windows=windows, settings={}, mask="edit 0.5")
        )  # a grid point: between two the host rounds
    if image_conditioning:
        warped = dict(use_timestep_transform=True)
        for settings in (
            dict(use_flaw_fix=True), dict(use_oscillation_guidance=True), dict(transform_scale=2.0), dict(scale_temporal=False),
        ):  # fmt: skip
            rows.append(dict(steps=30, windows=1, settings={**warped, **settings}, mask="ones"))
        rows.append(dict(steps=8, windows=4, settings=warped, mask="ones", negative=True))
        for settings, arguments in (
            ({}, {}), ({}, dict(use_sdedit=True)), (dict(scale_image_weight=True), {}),
            ({}, dict(use_oscillation_guidance_for_text=True, use_oscillation_guidance_for_image=True)),
        ):  # fmt: skip
            for frames in ([0], [0, 4]):
                call = dict(arguments, mask_index=frames, image_cfg_scale=5.0)
                rows.append(dict(steps=30, windows=1, settings={**warped, **settings}, mask=None, call=call))
    return rows


def edit_ratios(kind: str | None, batch_size: int) -> Tensor | None:
    if kind is None:
        return None
    ratios = torch.ones(batch_size, 5)
    if kind.startswith("edit"):
        ratios[:, :2] = float(kind.split()[1])
        ratios[-1, 2] = 0.0  # one more kept frame in the last sample: samples may differ
    return ratios


def run_case(case: dict[str, Any], network: nn.Module, text_encoder: Any) -> float:
    """Largest absolute difference between the host's sampler and ours."""
    from opensora.registry import SCHEDULERS, build_module

    call = dict(case.get("call", {}))
    batch_size = 1 if "mask_index" in call else 2  # upstream's reference conditioning works with one sample only
    prompts = ["a red circle moving right", "a blue square"][:batch_size]
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(batch_size, 4, 5, 12, 12, generator=generator)
    if "mask_index" in call:
        call["z_cond"] = torch.randn(z.shape, generator=generator)
        call["z_cond_mask"] = torch.zeros_like(z)
        call["z_cond_mask"][:, :, call["mask_index"]] = 1.0
    if case.get("negative"):
        call["neg_prompts"] = ["a blurry clip", "green"][:batch_size]
    # 360p. Where the warp's ratio is below 1 (small, short videos) upstream's float32 arithmetic can warp 1000 to more than
    # 1000: then no frame of a mask of ones is active in its first step, and all are noised anew in its second.
    sizes = dict(height=360.0, width=640.0, num_frames=51.0, ar=0.5625, fps=24.0)
    results = []
    for scheduler in (dict(type="rflow"), dict(type="perflow", windows=case["windows"])):
        built = build_module(dict(scheduler, num_sampling_steps=case["steps"], cfg_scale=7.0, **case["settings"]), SCHEDULERS)
        torch.manual_seed(2)
        results.append(
            built.sample(
                network, text_encoder, z.clone(), list(prompts), "cpu",
                additional_args={key: torch.full((batch_size,), value) for key, value in sizes.items()},
                mask=edit_ratios(case["mask"], batch_size), progress=False, **call,
            )
        )  # fmt: skip
    if (results[0] - z).abs().mean() < 0.1:
        raise AssertionError("the network does nothing: this comparison would prove nothing")
    return (results[0] - results[1]).abs().max().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-sora", type=Path, required=True, help="root of an Open-Sora v1.2.0 or v1.3 checkout")
    parser.add_argument("--seed", type=int, default=0, help="of the network's weights (default 0)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    sys.path.insert(0, str(args.open_sora.resolve()))

    import opensora_perflow  # noqa: F401  registers perflow
    from opensora_perflow import portable
    from opensora_perflow.worlds.text import TinyTextEncoder

    portable.activate()
    network, text_encoder = build_network(args.seed), TinyTextEncoder()
    text_encoder.y_embedder = network.y_embedder
    image_conditioning = (args.open_sora / "scripts" / "inference_i2v.py").is_file()
    if not image_conditioning:
        # v1.2's encoders take the prompts themselves and have no tokenize_fn.
        text_encoder = SimpleNamespace(encode=text_encoder.encode, null=text_encoder.null)
    rows = []
    with torch.no_grad():
        for case in cases(image_conditioning):
            rows.append(dict(case, max_abs_difference=run_case(case, network, text_encoder)))
            described = {key: value for key, value in case.items() if key not in ("steps", "windows")}
            print(f"N={case['steps']:<3} K={case['windows']:<3} {rows[-1]['max_abs_difference']:.2e}  {described}")
    worst = max(row["max_abs_difference"] for row in rows)
    print(f"{len(rows)} cases, largest absolute difference {worst:.2e} (accepted: {TOLERANCE:.0e})")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
