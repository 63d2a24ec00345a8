"""Small networks with the call contract of Open-Sora's STDiT3, and what a batch of their training looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.worlds.model import TinySTDiT
from opensora_perflow.worlds.text import TinyTextEncoder

PLAIN = dict(teacher=dict(steps_per_window=8, solver="euler"), draws=dict(starts="diffused", edge_mass=0.0, per_solve=1))
"""The recipe of the PeRFlow paper (arXiv:2405.07510): Euler steps, diffused starts, one time a solution. A test whose exact
answer is that recipe's names it; all others run on the scheduler's defaults."""

PROMPTS = ["a red circle moving right", "a blue square"]


def tiny_network(seed: int = 0, **settings: Any) -> TinySTDiT:
    """A TinySTDiT whose output is not the zero that its initialisation gives."""
    torch.manual_seed(seed)
    network = TinySTDiT(**{"hidden_size": 32, "depth": 1, "num_heads": 2, **settings})
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


def sizes(batch_size: int, num_frames: int = 17, side: int = 64, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The video sizes that the host sends with a batch."""
    values = {"height": side, "width": side, "num_frames": num_frames, "ar": 1.0, "fps": 24.0}
    return {key: torch.full((batch_size,), float(value), dtype=dtype) for key, value in values.items()}


def batch(network: nn.Module, batch_size: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents [B, 4, 5, 4, 4] and the host's model_args for them."""
    encoder = text_encoder(network)
    prompts = [PROMPTS[i % 2] for i in range(batch_size)]
    return torch.randn(batch_size, 4, 5, 4, 4), {**encoder.encode(prompts), **sizes(batch_size)}


def text_encoder(network: nn.Module) -> TinyTextEncoder:
    encoder = TinyTextEncoder()
    encoder.y_embedder = network.y_embedder
    return encoder


class CountCalls:
    """Counts a network's evaluations, in samples: a doubled batch of B counts 2 B."""

    def __init__(self, network: nn.Module) -> None:
        self.calls = self.samples = 0
        network.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.calls += 1
        self.samples += len(args[0])


class Reference13(nn.Module):
    """Has v1.3's arguments for reference frames and records what it was given; its output depends on each of them."""

    def __init__(self, tokens: int = 10, channels: int = 32) -> None:
        super().__init__()
        self.y_embedder = nn.Module()
        self.y_embedder.register_buffer("y_embedding", torch.randn(tokens, channels))
        self.y_embedder.uncond_prob = 0.1
        self.gain = nn.Parameter(torch.ones(()))
        self.x_embedder_cond, self.x_embedder_cond_mask = nn.Linear(1, 1), nn.Linear(1, 1)
        self.seen: list[dict[str, Any]] = []

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        cond: Tensor | None = None,
        cond_mask: Tensor | None = None,
        mask_index: list[int] | None = None,
        y_null: Tensor | None = None,
        text_uncond_prob: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        given = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        self.seen.append({**given, **kwargs})
        out = self.gain * x.float() * 0.1 + y.mean(dim=(1, 2, 3))[:, None, None, None, None]
        if cond is not None:
            out = out + 0.3 * cond + 0.05 * cond_mask
            used = (*self.x_embedder_cond.parameters(), *self.x_embedder_cond_mask.parameters())
            out = out + 0.01 * sum(weight.sum() for weight in used)
        return torch.cat([out, torch.zeros_like(out)], dim=1)


class Epsilon(nn.Module):
    """Has STDiT2's arguments, all of its own and no **kwargs; predicts 2 C channels and records what it was given.

    Its epsilon is `gain` times the best one for data N(0, 1) on a variance-preserving path, which is sigma x, plus what the
    text says; `sigma` maps the timestep to the noise amplitude.
    """

    def __init__(self, sigma: Callable[[Tensor], Tensor] | None = None, tokens: int = 10, channels: int = 32) -> None:
        super().__init__()
        self.y_embedder = nn.Module()
        self.y_embedder.register_buffer("y_embedding", torch.zeros(tokens, channels))
        self.y_embedder.uncond_prob = 0.1
        self.gain, self.variance = nn.Parameter(torch.ones(())), nn.Parameter(torch.full((), 0.25))
        self.sigma = sigma or (lambda timestep: (timestep + 1) / 1000)
        self.seen: list[dict[str, Any]] = []

    def forward(
        self, x, timestep, y, mask=None, x_mask=None, num_frames=None, height=None, width=None, ar=None, fps=None
    ) -> Tensor:
        self.seen.append({key: value for key, value in locals().items() if key not in ("self", "__class__")})
        sigma = self.sigma(timestep.double()).to(x.dtype)[:, None, None, None, None]
        prediction = self.gain * sigma * x + y.mean(dim=(1, 2, 3))[:, None, None, None, None]
        return torch.cat([prediction, self.variance * torch.ones_like(x)], dim=1)
