r"""The path from data to noise that a teacher was trained on, and what its network's outputs mean on it.

A point of a path is x_t = alpha(t) data + sigma(t) noise, with t as in conventions.py: 1 is noise, 0 is data.

    linear   alpha = 1 - t, sigma = t: rectified flow, the `rflow` of Open-Sora 1.2 and 1.3. The network outputs -dx/dt.
    ddpm     alpha^2 = alpha_bar, sigma^2 = 1 - alpha_bar: the `iddpm` of every Open-Sora 1.x. The network outputs the noise
             epsilon, and is told a timestep index 0..N-1 instead of t.

Index i of a diffusion of N steps is t = (i + 1) / N, so that t = 1 is its noisiest step and t = 0 lies below its cleanest:
the convention of the public PeRFlow code and of DPM-Solver. Between indices log alpha_bar is interpolated linearly, which
lets windows and steps lie anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from opensora_perflow.conventions import expand_like, from_timestep, host_to_velocity, interpolate, to_timestep
from opensora_perflow.method.predictions import WindowEdges, output_gain, to_velocity
from opensora_perflow.method.solvers import Velocity, hold_frames, states

Bounds = Callable[[Tensor], "tuple[Tensor, Tensor]"]
"""bounds(t) -> (t_start, t_end): the window that each sample's time lies in; all [B], float64."""

NOISE_SCHEDULES = ("linear", "squaredcos_cap_v2")


class Path(Protocol):
    """What the scheduler needs of a path. `output(x, t)` is a network's guided output, shaped like x [B, ...]."""

    predictions: tuple[str, ...]
    """What a student's output may stand for; the first is the default."""
    still_time: float
    """The time that training noises frozen frames to."""

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Point of the path; data and noise [B, ...], t [B]."""

    def to_timestep(self, t: Tensor) -> Tensor:
        """Flow time -> the timestep that the network is told, float32."""

    def from_timestep(self, timestep: Tensor) -> Tensor:
        """The host's timestep -> flow time in [0, 1], float64."""

    def states(self, output: Velocity, x: Tensor, times: Tensor, *, method: str, frame_mask: Tensor | None) -> Iterator[Tensor]:
        """Carry x along times [S + 1, B] with a teacher's output, yielding the state at each; frames [B, T] that are False in
        the mask stand still."""

    def student(self, output: Velocity, prediction: str, bounds: Bounds) -> Velocity:
        """A student's output as the velocity dx/dt of its window's straight line."""

    def output_units(self, prediction: str, bounds: Bounds) -> Callable[[Tensor], Tensor] | None:
        """t [B] -> factor [B] that turns an error of the velocity into one of the network's own output; None: always 1."""


class LinearPath:
    """Rectified flow: timesteps are t num_timesteps, and the output is data - noise."""

    predictions = ("velocity",)
    still_time = 0.0

    def __init__(self, num_timesteps: int = 1000) -> None:
        self.num_timesteps = num_timesteps

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return interpolate(data, noise, t)

    def to_timestep(self, t: Tensor) -> Tensor:
        return to_timestep(t, self.num_timesteps)

    def from_timestep(self, timestep: Tensor) -> Tensor:
        return from_timestep(timestep, self.num_timesteps).clamp(0.0, 1.0)

    def states(
        self, output: Velocity, x: Tensor, times: Tensor, *, method: str = "euler", frame_mask: Tensor | None = None
    ) -> Iterator[Tensor]:
        return states(hold_frames(self.student(output, "velocity", None), frame_mask), x, times, method=method)

    def student(self, output: Velocity, prediction: str, bounds: Bounds | None) -> Velocity:
        return lambda x, t: host_to_velocity(output(x, t))

    def output_units(self, prediction: str, bounds: Bounds) -> None:
        return None


class DDPMPath:
    """A diffusion of N steps with a network that predicts noise.

    Args:
        alpha_bar: Cumulative products of 1 - beta, [N], descending in (0, 1); kept in float64.
        final_alpha_bar: alpha_bar at t = 0. 1: the window that ends there ends at data, as Open-Sora's samplers do.
            alpha_bar[0], the public PeRFlow code's choice, leaves 1 % of noise in it.

    Raises:
        ValueError: alpha_bar does not descend, or leaves (0, 1).
    """

    predictions = ("ddim_eps", "diff_eps", "velocity")

    def __init__(self, alpha_bar: Tensor, final_alpha_bar: float = 1.0) -> None:
        nodes = torch.cat([torch.tensor([final_alpha_bar], dtype=torch.float64), alpha_bar.to("cpu", torch.float64)])
        if not (bool((nodes[1:] > 0).all()) and bool((nodes[1:] < 1).all()) and bool((nodes.diff() <= 0).all())):
            raise ValueError(
                f"alpha_bar must descend within (0, 1) from final_alpha_bar={final_alpha_bar}, got values from "
                f"{alpha_bar.max().item():.6g} to {alpha_bar.min().item():.6g}"
            )
        self.num_timesteps = len(alpha_bar)
        # x_t of frozen frames is upstream's index 0 (v1.1.0 opensora/schedulers/iddpm/gaussian_diffusion.py, training_losses)
        self.still_time = 1.0 / self.num_timesteps
        self._nodes = nodes.log()

    @classmethod
    def from_schedule(cls, name: str = "linear", num_timesteps: int = 1000) -> DDPMPath:
        """The path of one of `NOISE_SCHEDULES`; raises ValueError for others."""
        return cls(alpha_bars(name, num_timesteps))

    def alpha(self, t: Tensor) -> Tensor:
        """Amplitude of the data, float64, shaped like t."""
        return torch.exp(self._log_alpha_bar(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        """Amplitude of the noise, float64, shaped like t."""
        return torch.sqrt(-torch.expm1(self._log_alpha_bar(t)))

    def noise_ratio(self, t: Tensor) -> Tensor:
        """sigma / alpha: the clock in which the network's flow is d(x / alpha) / d(sigma / alpha) = epsilon."""
        return torch.sqrt(torch.expm1(-self._log_alpha_bar(t)))

    def time_of(self, noise_ratio: Tensor) -> Tensor:
        """Inverse of `noise_ratio`."""
        rising = -self._nodes.to(noise_ratio.device)
        value = torch.log1p(noise_ratio.to(torch.float64) ** 2)
        k = torch.searchsorted(rising, value.contiguous(), right=True).clamp(1, self.num_timesteps) - 1
        width = rising[k + 1] - rising[k]
        fraction = torch.where(width > 0, (value - rising[k]) / width, 0.0)  # width 0: final_alpha_bar = alpha_bar[0]
        return ((k + fraction) / self.num_timesteps).clamp(0.0, 1.0)

    def edges(self, t_start: Tensor, t_end: Tensor) -> WindowEdges:
        """Times and amplitudes at both edges of windows [B]."""
        return WindowEdges(
            t_start, t_end, self.alpha(t_start), self.alpha(t_end), self.sigma(t_start), self.sigma(t_end)
        )  # fmt: skip

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return expand_like(self.alpha(t), data) * data + expand_like(self.sigma(t), noise) * noise

    def to_timestep(self, t: Tensor) -> Tensor:
        # Below the cleanest index the network knows nothing; a float, because raw networks embed any real timestep.
        return (t.to(torch.float64) * self.num_timesteps - 1.0).clamp(min=0.0).to(torch.float32)

    def from_timestep(self, timestep: Tensor) -> Tensor:
        return ((timestep.to(torch.float64) + 1.0) / self.num_timesteps).clamp(0.0, 1.0)

    def states(
        self, output: Velocity, x: Tensor, times: Tensor, *, method: str = "euler", frame_mask: Tensor | None = None
    ) -> Iterator[Tensor]:
        r"""Follow the probability-flow ODE d(x / alpha) / d(sigma / alpha) = epsilon(x, t). Euler steps of it are DDIM steps:

            x_next = alpha_next / alpha x + (sigma_next - alpha_next / alpha sigma) epsilon(x, t)

        Every sample steps on its own times, so windows may differ in width.

        Source: DDIM (arXiv:2010.02502), eq. 14; its steps are eq. 12 with sigma = 0.
        """
        moving = None if frame_mask is None else frame_mask[:, None, :, None, None]

        def still(state: Tensor) -> Tensor:
            return state if moving is None else torch.where(moving, state, x)

        def slope(y: Tensor, noise_ratio: Tensor) -> Tensor:
            t = self.time_of(noise_ratio)
            return output(still(y * expand_like(self.alpha(t), y)), t)

        path = states(slope, x / expand_like(self.alpha(times[0]), x), self.noise_ratio(times), method=method)
        for y, t in zip(path, times):
            yield still(y * expand_like(self.alpha(t), x))

    def student(self, output: Velocity, prediction: str, bounds: Bounds) -> Velocity:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return to_velocity(output(x, t), x, t, self.edges(*bounds(t)), prediction)

        return velocity

    def output_units(self, prediction: str, bounds: Bounds) -> Callable[[Tensor], Tensor] | None:
        if prediction == "velocity":
            return None
        return lambda t: 1.0 / output_gain(t, self.edges(*bounds(t)), prediction)

    def _log_alpha_bar(self, t: Tensor) -> Tensor:
        position = (t.to(torch.float64) * self.num_timesteps).clamp(0, self.num_timesteps)  # a rounding may lead outside
        k = position.floor().clamp(0, self.num_timesteps - 1).long()
        nodes = self._nodes.to(t.device)
        return nodes[k] + (position - k) * (nodes[k + 1] - nodes[k])


def alpha_bars(name: str = "linear", num_timesteps: int = 1000) -> Tensor:
    """Cumulative products of 1 - beta of a noise schedule, [num_timesteps], float64.

    linear: betas evenly spaced from 1e-4 to 0.02, both times 1000 / num_timesteps. squaredcos_cap_v2: alpha_bar follows
    cos^2((t + 0.008) / 1.008 pi / 2), with no beta above 0.999.

    Raises:
        ValueError: unknown name.

    Source: DDPM (arXiv:2006.11239), section 4; improved DDPM (arXiv:2102.09672), eq. 17: the two that Open-Sora names.
    """
    if name == "linear":
        scale = 1000 / num_timesteps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)
    elif name == "squaredcos_cap_v2":
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        wanted = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1.0 - wanted[1:] / wanted[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"unknown noise_schedule {name!r}; known: {', '.join(NOISE_SCHEDULES)}")
    return torch.cumprod(1.0 - betas, dim=0)


def check_prediction(path: Path, prediction: str) -> str:
    """The prediction that a student makes on this path; "auto" is the path's first.

    Raises:
        ValueError: a prediction that the path's networks cannot make.
    """
    if prediction == "auto":
        return path.predictions[0]
    if prediction not in path.predictions:
        raise ValueError(
            f'prediction={prediction!r} needs an epsilon network (IDDPM), path="ddpm"; rectified-flow networks (rflow), '
            f'path="linear", output a {path.predictions[0]}: use prediction="auto"'
        )
    return prediction
