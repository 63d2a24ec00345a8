"""What a user waits for, counted: text encoder, network and VAE of a whole video, with the host's steps and with 4.

    python benchmarks/end_to_end.py --open-sora ROOT [--config CONFIG] [--videos "360p x 102" ...]

Floating-point operations of the real classes on torch's meta device, in TFLOP: nothing is computed and no weights are needed.
The small decoder is perflow_small_decoder's, for Open-Sora 1.2. Times follow from them on a card whose kernels keep up; a
decoder of few channels does not reach the rate of a network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from opensora_perflow.hosts.meta import unloaded
from opensora_perflow.hosts.outline import Bucket, Outline
from opensora_perflow.tools.activations import flops
from opensora_perflow.tools.estimate import outline_of

CONFIG = Path(__file__).parents[1] / "configs" / "opensora" / "perflow_stage1.py"
TERA = 1e12
TOKENS = 300
HOST_STEPS = 30


def text(plan: Outline) -> int:
    """Of one prompt."""
    tokens = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    return flops(lambda: plan.encoders["text encoder"](input_ids=tokens, attention_mask=tokens))


def decoding(plan: Outline, bucket: Bucket) -> Callable[[], object]:
    vae = plan.encoders["VAE"].eval()
    z = torch.empty(1, *bucket.latent, device="meta", dtype=torch.bfloat16)
    return lambda: vae.decode(z, num_frames=bucket.pixels[0])


def small(vae: nn.Module) -> nn.Module:
    from diffusers import AutoencoderTiny

    from opensora_perflow.hosts.v1.small_decoder import with_small_decoder

    with unloaded():
        tiny = AutoencoderTiny()
    return with_small_decoder(vae, tiny.to("meta", torch.bfloat16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-sora", type=Path, required=True, metavar="ROOT", help="checkout of v1.2.0")
    parser.add_argument(
        "--config", type=Path, default=CONFIG, help="a training's, whose models are counted (default stage 1's)"
    )
    parser.add_argument("--videos", nargs="+", default=["144p x 51", "240p x 102", "360p x 102"], help="buckets of the config")
    args = parser.parse_args()
    plan = outline_of(args.config, args.open_sora)
    chosen = [bucket for bucket in plan.buckets if bucket.name in args.videos]
    if len(chosen) < len(args.videos):
        parser.error(f"--videos must be of {', '.join(bucket.name for bucket in plan.buckets)}, got {', '.join(args.videos)}")
    plan.network.eval()
    with torch.no_grad():
        prompt = text(plan)
        evaluation = {bucket.name: flops(partial(plan.forward, bucket, 1)) for bucket in chosen}
        decoders = [{bucket.name: flops(decoding(plan, bucket)) for bucket in chosen}]
        small(plan.encoders["VAE"])
        decoders.append({bucket.name: flops(decoding(plan, bucket)) for bucket in chosen})
    print("| video | network evaluations | decoder | text | network | decoding | together | of the host's |")
    print("|---" * 8 + "|")
    for bucket in chosen:
        rows = [(2 * HOST_STEPS, "host's", 0), (4, "host's", 0), (4, "small", 1)]
        whole = None
        for evaluations, decoder, which in rows:
            parts = [prompt, evaluations * evaluation[bucket.name], decoders[which][bucket.name]]
            whole = whole or sum(parts)
            cells = " | ".join(f"{part / TERA:,.1f}" for part in (*parts, sum(parts)))
            print(f"| {bucket.name} | {evaluations} | {decoder} | {cells} | 1/{whole / sum(parts):.1f} |")


if __name__ == "__main__":
    sys.exit(main())
