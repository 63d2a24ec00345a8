"""The demo's networks as something to plan on: the tiny video model, and the mixture whose answer is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.v1.conditions import sampling_condition
from opensora_perflow.hosts.v1.stdit import velocity_field
from opensora_perflow.planning.probe import Probe
from opensora_perflow.worlds.clips import FPS, HEIGHT, NUM_FRAMES, WIDTH, contents
from opensora_perflow.worlds.mixture import DIM, NUM_CLASSES, NUM_TIMESTEPS, ClassText, Mixture, MixtureNetwork
from opensora_perflow.worlds.model import load_teacher
from opensora_perflow.worlds.text import TinyTextEncoder

LATENT_SHAPE = (4, 5, 8, 8)
"""Of the demo's clips: TinyVAE makes 17 frames of 64 x 64 to these."""


def mixture_probe(num_samples: int, seed: int, guidance_scale: float = 2.0, network: nn.Module | None = None) -> Probe:
    """The benchmark's mixture (worlds/mixture.py), classes in turn; `network` is a student of it, None the teacher itself."""
    if network is None:
        network = MixtureNetwork(Mixture.standard(), width=1).eval()  # untrained, the MLP adds nothing at any width
    prompts = [f"class {i % NUM_CLASSES}" for i in range(num_samples)]
    noise = torch.randn(num_samples, DIM, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    return _probe(network, ClassText(), prompts, noise, {}, guidance_scale)


def video_probe(num_samples: int, seed: int, guidance_scale: float = 3.0, network: nn.Module | None = None) -> Probe:
    """The demo's tiny video model, captions in random order; `network` is a student of it, None the shipped teacher."""
    network = load_teacher() if network is None else network
    text_encoder = TinyTextEncoder()
    text_encoder.y_embedder = network.y_embedder
    generator = torch.Generator().manual_seed(seed)
    prompts = _captions(num_samples, generator)
    noise = torch.randn(num_samples, *LATENT_SHAPE, generator=generator)
    return _probe(network, text_encoder, prompts, noise, _sizes(num_samples), guidance_scale)


def video_conditions(batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """model_args of a training batch of the tiny video model: captions, drawn, and sizes."""
    return {**TinyTextEncoder().encode(_captions(batch_size, generator)), **_sizes(batch_size)}


def _captions(count: int, generator: torch.Generator) -> list[str]:
    known = sorted({content.caption for content in contents()})
    order = torch.randperm(len(known), generator=generator).tolist()
    return [known[order[i % len(known)]] for i in range(count)]


def _sizes(count: int) -> dict[str, Tensor]:
    sizes = {"num_frames": NUM_FRAMES, "height": HEIGHT, "width": WIDTH, "ar": HEIGHT / WIDTH, "fps": FPS}
    return {key: torch.full((count,), float(value)) for key, value in sizes.items()}


def _probe(
    network: nn.Module,
    text_encoder: Any,
    prompts: Sequence[str],
    noise: Tensor,
    sizes: Mapping[str, Tensor],
    guidance_scale: float,
) -> Probe:
    condition = sampling_condition(
        network,
        text_encoder,
        prompts,
        negative_prompts=None,
        additional_args=sizes,
        reference=None,
        needs_null=guidance_scale != 1.0,
    )
    velocity = velocity_field(network, network, condition, num_timesteps=NUM_TIMESTEPS, text_scale=guidance_scale)
    return Probe(velocity, noise)
