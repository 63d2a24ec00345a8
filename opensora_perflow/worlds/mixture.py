r"""A flow whose answer is known: a Gaussian mixture with classes, behind the call contract of Open-Sora's networks.

Latents are [B, 16, 1, 1, 1], prompts name one of 4 classes. `MixtureNetwork` answers in closed form
until it is trained, `ClassText` is the text encoder; the PeRFlow object distils and samples them as it does Open-Sora's.

The data are 24 modes of equal weight, 6 a class, N(mu_j, s^2 I). On the straight path x_t has components N((1-t) mu_j, v I),
v = (1-t)^2 s^2 + t^2, so with the responsibilities r_j of the (asked) modes and m = sum_j r_j mu_j

    velocity = E[noise - data | x_t] = c x - (1 + c (1 - t)) m,     c = (t - (1-t) s^2) / v.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DIM, NUM_MODES, NUM_CLASSES = 16, 24, 4
NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class Mixture:
    """means [24, 16]; classes [24], the class of each mode; std: s of every mode."""

    means: Tensor
    classes: Tensor
    std: float

    @classmethod
    def standard(cls, seed: int = 0, spread: float = 0.55, std: float = 0.45) -> Mixture:
        """The benchmark's mixture: means drawn from N(0, spread^2 I) with `seed`, mode j in class j mod 4."""
        means = spread * torch.randn(NUM_MODES, DIM, generator=torch.Generator().manual_seed(seed))
        return cls(means, torch.arange(NUM_MODES) % NUM_CLASSES, std)

    def draw(self, class_idx: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Data of the classes [B]: latents [B, 16, 1, 1, 1], float32."""
        place = torch.randint(NUM_MODES // NUM_CLASSES, class_idx.shape, generator=generator)
        x = self.means[place * NUM_CLASSES + class_idx]
        return (x + self.std * torch.randn(x.shape, generator=generator))[:, :, None, None, None]


class ClassText:
    """Text encoder for the prompts "class 0" to "class 3": one-hot embeddings [B, 1, 1, 5] on `device`; the last place is the
    null text."""

    output_dim, model_max_length = NUM_CLASSES + 1, 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Raises ValueError for a prompt that names no class."""
        known = [f"class {k}" for k in range(NUM_CLASSES)]
        unknown = [prompt for prompt in prompts if prompt not in known]
        if unknown:
            raise ValueError(f"prompts must be among {', '.join(known)}, got {unknown[0]!r}")
        return self.of(torch.tensor([known.index(prompt) for prompt in prompts]))

    def of(self, class_idx: Tensor) -> dict[str, Tensor]:
        """As `encode`, from class indices [B]."""
        y = nn.functional.one_hot(class_idx.to(self.device), NUM_CLASSES + 1).float()
        return {"y": y[:, None, None], "mask": torch.ones(len(y), 1, dtype=torch.int64, device=self.device)}

    def null(self, n: int) -> Tensor:
        return self.of(torch.full((n,), NUM_CLASSES))["y"]


class Sinusoids(nn.Module):
    """Cosines and sines of the timestep; `mlp` is where the host's networks have theirs, and does nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(half) / half))
        self.mlp = nn.Identity()

    def forward(self, timestep: Tensor) -> Tensor:
        angle = timestep[:, None] * self.frequencies
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class MixtureNetwork(nn.Module):
    """The mixture's own velocity, exact, plus a small MLP that starts at zero: a student that starts as its teacher.

    As with Open-Sora's networks, the teacher is a copy of the student before its first step, and costs as much to evaluate.
    """

    def __init__(self, mixture: Mixture, width: int = 128, time_channels: int = 64) -> None:
        super().__init__()
        self.std = mixture.std
        self.register_buffer("means", mixture.means)
        asked = nn.functional.one_hot(mixture.classes, NUM_CLASSES + 1).float().T
        asked[NUM_CLASSES] = 1.0  # the null text asks for every mode
        self.register_buffer("log_asked", asked.log())  # [5, 24]: 0 for modes of the class, -inf for others
        self.y_embedder = nn.Module()  # the null text, where the host's networks keep theirs
        self.y_embedder.register_buffer("y_embedding", ClassText().null(1)[0, 0])
        self.y_embedder.uncond_prob = 0.0
        self.t_embedder = Sinusoids(time_channels)
        self.layers = nn.Sequential(
            nn.Linear(DIM + time_channels + NUM_CLASSES + 1, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, DIM),
        )  # fmt: skip
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None, **sizes: Any) -> Tensor:
        """In the host's sign, data - noise: x [B, 16, 1, 1, 1], timestep [B] in 0..1000, y [B, 1, 1, 5] -> like x."""
        features = torch.cat([x.flatten(1), self.t_embedder(timestep), y[:, 0, 0]], dim=1)
        return (self.layers(features) - self._velocity(x.flatten(1), timestep / NUM_TIMESTEPS, y[:, 0, 0])).reshape(x.shape)

    def _velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        t = t[:, None]
        variance = (1 - t) ** 2 * self.std**2 + t**2
        # -|x - (1-t) mu|^2 / 2 without the term that all modes share.
        overlap = (1 - t) * x @ self.means.T - (1 - t) ** 2 * self.means.square().sum(dim=1) / 2
        mean = torch.softmax(overlap / variance + self.log_asked[y.argmax(dim=1)], dim=1) @ self.means
        c = (t - (1 - t) * self.std**2) / variance
        return c * x - (1 + c * (1 - t)) * mean
