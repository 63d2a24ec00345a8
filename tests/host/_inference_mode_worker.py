"""Samples in torch.inference_mode() and then trains with the same live objects; see test_callers.py.

    python _inference_mode_worker.py ROOT TAG

The network is the host's own class: its position tables and rotary frequencies are cached by whoever calls first.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

PROMPTS = ["a red circle moving right", "a blue square"]
LATENTS = (2, 4, 5, 8, 8)


def sizes() -> dict[str, Tensor]:
    values = {"height": 64.0, "width": 64.0, "num_frames": 17.0, "ar": 1.0, "fps": 24.0}
    return {key: torch.full((len(PROMPTS),), value) for key, value in values.items()}


def main() -> None:
    root, tag = sys.argv[1:]
    sys.path.insert(0, root)
    from opensora_perflow import portable
    from opensora_perflow.run import register_with_host

    portable.activate()
    register_with_host()
    from _harness import NETWORKS
    from opensora.registry import MODELS, SCHEDULERS, build_module

    import opensora_perflow.hosts.tiny  # noqa: F401

    torch.manual_seed(0)
    text_encoder = build_module({"type": "perflow_tiny_text"}, MODELS)
    flags = {} if tag == "1.0" else {"qk_norm": True, "enable_flash_attn": False, "enable_layernorm_kernel": False}
    network = build_module(
        {"type": NETWORKS[tag], **flags},
        MODELS,
        input_size=LATENTS[2:],
        in_channels=LATENTS[1],
        caption_channels=text_encoder.output_dim,
        model_max_length=text_encoder.model_max_length,
    )
    text_encoder.y_embedder = network.y_embedder
    scheduler = build_module({"type": "perflow", "cfg_scale": 7.0}, SCHEDULERS)
    with torch.inference_mode():
        noise = torch.randn(LATENTS)
        samples = scheduler.sample(
            network.eval(), text_encoder, z=noise, prompts=PROMPTS, device="cpu", additional_args=sizes(), progress=False
        )
    tokens = text_encoder.encode(PROMPTS)
    loss = scheduler.training_losses(network.train(), torch.randn(LATENTS), {**tokens, **sizes()})["loss"]
    loss.mean().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert torch.isfinite(samples).all() and torch.isfinite(loss).all() and len(gradients) > 0
    print(f"trained {len(gradients)} parameters after sampling in inference mode")


if __name__ == "__main__":
    main()
