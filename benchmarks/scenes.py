r"""An endless video whose flow is known, given any of its frames: loops can be measured against it without an error of its own.

Latents are [B, 8, T, 1, 1]; prompts name one of 4 classes (mixture.ClassText). A video shows one of its class's scenes: frame f
is mu_k + s g_f, with the scene's mean mu_k in R^8 and, in each channel, a stationary Gaussian process g of correlation R. So
every piece of a video has the same distribution as any other, and a perfect sampler's loops neither drift nor show a seam.

Frames have flow times of their own, t_f: 0 for a given frame, t for the others. With a_f = 1 - t_f, A = diag(a), B = diag(t_f),
the scenes' posterior is a softmax, m its mean over the mu_k, and

    S = s^2 A R A + B^2,    velocity = E[noise - data | x] = (B - s^2 R A) S^-1 (x - a m) - m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.worlds.mixture import NUM_CLASSES, NUM_TIMESTEPS, ClassText

CHANNELS, NUM_SCENES = 8, 12


@dataclass(frozen=True)
class Scenes:
    """means [12, 8]; classes [12], the class of each scene; std: s; the process has the correlation of `correlation`."""

    means: Tensor
    classes: Tensor
    std: float

    @classmethod
    def standard(cls, seed: int = 0, spread: float = 0.7, std: float = 0.5) -> Scenes:
        """The benchmark's scenes: means drawn from N(0, spread^2 I) with `seed`, scene k in class k mod 4."""
        means = spread * torch.randn(NUM_SCENES, CHANNELS, generator=torch.Generator().manual_seed(seed))
        return cls(means, torch.arange(NUM_SCENES) % NUM_CLASSES, std)

    @staticmethod
    def correlation(num_frames: int) -> Tensor:
        """R [T, T]: a damped oscillation, 0.98 0.93^d cos(0.6 d) at a distance of d > 0 frames; 1 at 0."""
        distance = (torch.arange(num_frames)[:, None] - torch.arange(num_frames)).abs().float()
        return torch.where(distance == 0, 1.0, 0.98 * 0.93**distance * torch.cos(0.6 * distance))

    def draw(self, class_idx: Tensor, num_frames: int, generator: torch.Generator | None = None) -> Tensor:
        """Videos of the classes [B]: latents [B, 8, T, 1, 1], float32."""
        place = torch.randint(NUM_SCENES // NUM_CLASSES, class_idx.shape, generator=generator)
        normal = torch.randn(len(class_idx), CHANNELS, num_frames, generator=generator)
        moving = normal @ torch.linalg.cholesky(self.correlation(num_frames)).T
        return (self.means[place * NUM_CLASSES + class_idx][:, :, None] + self.std * moving)[..., None, None]

    def velocity(self, x: Tensor, t: Tensor, log_asked: Tensor) -> Tensor:
        """dx/dt of the videos x [B, 8, T] whose frames are at the times t [B, T]; log_asked [B, 12] is 0 for the scenes that
        may be shown and -inf for the others. At frames of t = 0 it says nothing."""
        a, variance = 1.0 - t, self.std**2 * self.correlation(t.shape[1])
        inverse = torch.linalg.inv(a[:, :, None] * variance * a[:, None] + torch.diag_embed(t**2))
        weights = (inverse @ a[:, :, None]).squeeze(-1)  # S^-1 a
        overlap = (x @ weights[:, :, None]).squeeze(-1) @ self.means.T
        overlap = overlap - self.means.square().sum(dim=1) / 2 * (a * weights).sum(dim=1, keepdim=True)
        mean = (torch.softmax(overlap + log_asked, dim=1) @ self.means)[:, :, None]
        gain = torch.diag_embed(t) - variance * a[:, None]
        return (x - a[:, None] * mean) @ (gain @ inverse).transpose(1, 2) - mean


class SceneNetwork(nn.Module):
    """The scenes' own velocity, exact, plus a small MLP that starts at zero: a student that starts as its teacher.

    Takes frame masks as Open-Sora's networks do; a network is for videos of `num_frames` frames.
    """

    def __init__(self, scenes: Scenes, num_frames: int, width: int = 192, time_channels: int = 32) -> None:
        super().__init__()
        self.scenes, self.num_frames = scenes, num_frames
        asked = nn.functional.one_hot(scenes.classes, NUM_CLASSES + 1).float().T
        asked[NUM_CLASSES] = 1.0  # the null text asks for every scene
        self.register_buffer("log_asked", asked.log())
        self.y_embedder = nn.Module()  # the null text, where the host's networks keep theirs
        self.y_embedder.register_buffer("y_embedding", ClassText().null(1)[0, 0])
        self.y_embedder.uncond_prob = 0.0
        half = time_channels // 2
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(half) / half))
        size = CHANNELS * num_frames
        self.layers = nn.Sequential(
            nn.Linear(size + num_frames + time_channels + NUM_CLASSES + 1, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, size),
        )  # fmt: skip
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(
        self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None, x_mask: Tensor | None = None, **sizes: Any
    ) -> Tensor:
        """In the host's sign, data - noise: x [B, 8, T, 1, 1], timestep [B] in 0..1000, y [B, 1, 1, 5], x_mask bool [B, T]
        (False = given frame) -> like x."""
        videos, text = x.flatten(2), y[:, 0, 0]
        generated = torch.ones_like(videos[:, 0]) if x_mask is None else x_mask.to(x.dtype)
        angle = timestep[:, None] * self.frequencies
        features = torch.cat([videos.flatten(1), generated, angle.cos(), angle.sin(), text], dim=1)
        exact = self.scenes.velocity(videos, timestep[:, None] / NUM_TIMESTEPS * generated, self.log_asked[text.argmax(dim=1)])
        return self.layers(features).reshape(x.shape) - exact.reshape(x.shape)
