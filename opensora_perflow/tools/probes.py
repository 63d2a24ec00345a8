"""The demo's networks as fields, and as something to plan on: the tiny video model, and the mixture whose answer is known."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.v1.conditions import sampling_condition
from opensora_perflow.hosts.v1.stdit import velocity_field
from opensora_perflow.method.solvers import Velocity, hold_frames
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
    return Probe(guided_field(network, ClassText(), prompts, {}, guidance_scale), noise)


def video_probe(num_samples: int, seed: int, guidance_scale: float = 3.0, network: nn.Module | None = None) -> Probe:
    """The demo's tiny video model, captions in random order; `network` is a student of it, None the shipped teacher."""
    network = load_teacher() if network is None else network
    text_encoder = TinyTextEncoder()
    text_encoder.y_embedder = network.y_embedder
    generator = torch.Generator().manual_seed(seed)
    prompts = shuffled((content.caption for content in contents()), num_samples, generator)
    noise = torch.randn(num_samples, *LATENT_SHAPE, generator=generator)
    return Probe(guided_field(network, text_encoder, prompts, sizes(num_samples), guidance_scale), noise)


def shuffled(captions: Iterable[str], count: int, generator: torch.Generator) -> list[str]:
    """The different captions in random order, over again where more are asked for."""
    known = sorted(set(captions))
    order = torch.randperm(len(known), generator=generator).tolist()
    return [known[order[i % len(known)]] for i in range(count)]


def sizes(count: int, num_frames: int = NUM_FRAMES, height: int = HEIGHT, width: int = WIDTH) -> dict[str, Tensor]:
    """What Open-Sora's scripts say of a batch of videos, [count] each."""
    values = {"num_frames": num_frames, "height": height, "width": width, "ar": height / width, "fps": FPS}
    return {key: torch.full((count,), float(value)) for key, value in values.items()}


def guided_field(
    network: nn.Module,
    text_encoder: Any,
    prompts: Sequence[str],
    sizes: Mapping[str, Tensor],
    scale: float,
    frame_mask: Tensor | None = None,
) -> Velocity:
    """The network's velocity for prompts, guided by their text; frames that are False in frame_mask [B, T] stand still."""
    condition = sampling_condition(
        network,
        text_encoder,
        prompts,
        negative_prompts=None,
        additional_args=sizes,
        reference=None,
        needs_null=scale != 1.0,
    )
    settings = dict(num_timesteps=NUM_TIMESTEPS, text_scale=scale, frame_mask=frame_mask)
    field = velocity_field(network, network, condition, **settings)
    return field if frame_mask is None else hold_frames(field, frame_mask)
