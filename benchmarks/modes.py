r"""Flows of Gaussian modes, each with a weight and a covariance of its own: further worlds with a closed-form teacher.

With components N(mu_j, S_j) of weight w_j, x_t has the components N((1-t) mu_j, V_j), V_j = (1-t)^2 S_j + t^2 I. So with d_j =
x - (1-t) mu_j and the responsibilities r_j of the asked modes

    velocity = E[noise - data | x_t] = sum_j r_j (t V_j^-1 d_j - mu_j - (1-t) S_j V_j^-1 d_j).

forty  32 dimensions, 40 modes in 4 classes; weights from 1 to 1/40 of each other, standard deviations from .2 to .6
rings  2 dimensions, four rings of narrow modes, a class each
ar1    12 frames of 2 x 2 pixels, each pixel an AR(1) process around a moving level; a slow and a fast one in each of 4 classes
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opensora_perflow.worlds.mixture import NUM_CLASSES, NUM_TIMESTEPS, ClassText, Sinusoids


@dataclass(frozen=True)
class Modes:
    """J modes of D = product of `shape` dimensions.

    means [J, D]. variances: of round modes [J, 1]; else [J, D] along the axes. axes: Of each mode, the columns of an orthogonal
    matrix, [J, D, D]; None: modes are round. weights [J], > 0. classes [J]. shape: C, T, H, W of a sample.
    """

    means: Tensor
    variances: Tensor
    weights: Tensor
    classes: Tensor
    shape: tuple[int, ...]
    axes: Tensor | None = None

    def draw(self, class_idx: Tensor, generator: torch.Generator) -> Tensor:
        """Data of the classes [B]: [B, C, T, H, W], float32."""
        asked = (self.classes == class_idx[:, None]) * self.weights
        mode = torch.multinomial(asked, 1, generator=generator)[:, 0]
        x = self.variances[mode].sqrt() * torch.randn(len(mode), self.means.shape[1], generator=generator)
        if self.axes is not None:
            x = torch.einsum("bij,bj->bi", self.axes[mode], x)
        return (self.means[mode] + x).reshape(-1, *self.shape)


def forty() -> Modes:
    generator = torch.Generator().manual_seed(40)
    means = 0.45 * torch.randn(40, 32, generator=generator)
    std = 0.2 + 0.4 * torch.rand(40, 1, generator=generator)
    return Modes(means, std**2, 1.0 / torch.arange(1, 41), torch.arange(40) % NUM_CLASSES, (32, 1, 1, 1))


def rings() -> Modes:
    means, weights, classes = [], [], []
    for class_idx, radius in enumerate((0.5, 1.0, 1.5, 2.0)):
        count = int(96 * radius)  # as near to each other as they are wide: no bumps
        around = 2 * math.pi * torch.arange(count) / count
        means.append(radius * torch.stack([around.cos(), around.sin()], dim=1))
        weights.append(torch.full((count,), 1.0 / count))
        classes.append(torch.full((count,), class_idx))
    variances = torch.full((sum(map(len, means)), 1), 0.07**2)
    return Modes(torch.cat(means), variances, torch.cat(weights), torch.cat(classes), (2, 1, 1, 1))


def ar1() -> Modes:
    frames, pixels = 12, 4
    time = torch.arange(frames)
    means, variances, axes = [], [], []
    for number in range(2 * NUM_CLASSES):
        stays = 0.95 if number < NUM_CLASSES else 0.5  # slow, and fast
        covariance = 0.4**2 * stays ** (time[:, None] - time).abs()
        along, basis = torch.linalg.eigh(covariance.double())
        variances.append(along.float().repeat_interleave(pixels))
        axes.append(torch.kron(basis.contiguous(), torch.eye(pixels, dtype=torch.float64)).float())
        # The level's bump passes the pixels in an order of the class.
        place = (torch.arange(pixels) + number) % pixels
        means.append((-((time[:, None] / 3.0 - place) ** 2)).exp().flatten() * (1.0 if number < NUM_CLASSES else -1.0))
    classes = torch.arange(2 * NUM_CLASSES) % NUM_CLASSES
    return Modes(torch.stack(means), torch.stack(variances), torch.ones(8), classes, (1, frames, 2, 2), torch.stack(axes))


class ModesNetwork(nn.Module):
    """The modes' own velocity, exact, plus a small MLP that starts at zero; see worlds/mixture.py."""

    def __init__(self, modes: Modes, width: int = 256, time_channels: int = 64) -> None:
        super().__init__()
        dim = modes.means.shape[1]
        self.register_buffer("means", modes.means)
        self.register_buffer("variances", modes.variances)
        self.register_buffer("axes", modes.axes)
        asked = nn.functional.one_hot(modes.classes, NUM_CLASSES + 1).float().T
        asked[NUM_CLASSES] = 1.0  # the null text asks for every mode
        self.register_buffer("log_weights", (asked * modes.weights).log())  # [5, J]
        self.y_embedder = nn.Module()
        self.y_embedder.register_buffer("y_embedding", ClassText().null(1)[0, 0])
        self.y_embedder.uncond_prob = 0.0
        self.t_embedder = Sinusoids(time_channels)
        self.layers = nn.Sequential(
            nn.Linear(dim + time_channels + NUM_CLASSES + 1, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, dim),
        )  # fmt: skip
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor | None = None, **sizes: Tensor) -> Tensor:
        """In the host's sign, data - noise: x [B, C, T, H, W], timestep [B] in 0..1000, y [B, 1, 1, 5] -> like x."""
        features = torch.cat([x.flatten(1), self.t_embedder(timestep), y[:, 0, 0]], dim=1)
        return (self.layers(features) - self.velocity(x.flatten(1), timestep / NUM_TIMESTEPS, y[:, 0, 0])).reshape(x.shape)

    def velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The teacher's dx/dt: x [B, D], t [B], y [B, 5] -> [B, D]."""
        log_weights = self.log_weights[y.argmax(dim=1)]
        if self.axes is None:
            return self._of_round_modes(x, t[:, None], log_weights)
        t = t[:, None, None]
        along = torch.einsum("jdi,bjd->bji", self.axes, x[:, None] - (1 - t) * self.means)
        variance = (1 - t) ** 2 * self.variances + t**2
        scaled = along / variance
        likelihood = -(scaled * along + variance.log()).sum(dim=2) / 2
        out = torch.einsum("jid,bjd->bji", self.axes, (t - (1 - t) * self.variances) * scaled) - self.means
        return (torch.softmax(likelihood + log_weights, dim=1)[:, :, None] * out).sum(dim=1)

    def _of_round_modes(self, x: Tensor, t: Tensor, log_weights: Tensor) -> Tensor:
        """The same by products of matrices, since d_j need not be known: ten times as fast with 40 modes."""
        variances = self.variances[:, 0]
        variance = (1 - t) ** 2 * variances + t**2  # [B, J]
        overlap = (1 - t) * x @ self.means.T - (1 - t) ** 2 * self.means.square().sum(dim=1) / 2 - x.square().sum(1, True) / 2
        likelihood = overlap / variance - x.shape[1] * variance.log() / 2
        share = torch.softmax(likelihood + log_weights, dim=1)
        c = (t - (1 - t) * variances) / variance
        return (share * c).sum(1, True) * x - (share * (1 + c * (1 - t))) @ self.means
