r"""Diffusions (DDPM): the process of Open-Sora's `iddpm`, and what a student of an epsilon network outputs for a window.

alpha^2 = alpha_bar, sigma^2 = 1 - alpha_bar. The network outputs the noise epsilon, and is told a timestep index 0..N-1
instead of t. Index i of a diffusion of N steps is t = (i + 1) / N. So t = 1 is its noisiest step and t = 0 lies below its
cleanest. The public PeRFlow code and DPM-Solver have this convention. Between indices log alpha_bar is interpolated linearly,
which lets windows and steps lie anywhere.

A window carries x_s (noisy edge t_s) to x_e (clean edge t_e) on a straight line. With lambda = alpha_e / alpha_s the three
parametrisations are

    velocity    v   = (x_e - x_s) / (t_e - t_s)
    ddim_eps    eps = (x_e - lambda x_s) / eta,  eta = sigma_e - lambda sigma_s            (a DDIM step's own epsilon)
    diff_eps    eps = (x_e - lambda x_s) / eta,  eta = -sqrt(1 - gamma^2) / gamma,  gamma = alpha_s / alpha_e

Source: PeRFlow (arXiv:2405.07510), section 3 and its public training scripts (velocity / ddim_eps / diff_eps).
The two epsilon forms need alpha_s > 0, so a process that is pure noise at t = 1 (rectified flow) has only the velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.conventions import expand_like
from opensora_perflow.method.process import Bounds, Output
from opensora_perflow.method.solvers import states

NOISE_SCHEDULES = ("linear", "squaredcos_cap_v2")
PREDICTIONS = ("velocity", "ddim_eps", "diff_eps")


@dataclass(frozen=True)
class WindowEdges:
    """Times and path amplitudes at both edges of each sample's window; every field [B], float64."""

    t_start: Tensor
    t_end: Tensor
    alpha_start: Tensor
    alpha_end: Tensor
    sigma_start: Tensor
    sigma_end: Tensor


def edge_map(edges: WindowEdges, prediction: str) -> tuple[Tensor, Tensor]:
    """(lambda, eta) of x_e = lambda x_s + eta eps, each [B], for an epsilon prediction.

    Raises:
        ValueError: not an epsilon prediction, or a window whose noisy edge holds no signal (alpha = 0).
    """
    if prediction not in ("ddim_eps", "diff_eps"):
        raise ValueError(f"unknown epsilon prediction {prediction!r}; known: ddim_eps, diff_eps")
    if bool((edges.alpha_start <= 0).any()):
        raise ValueError(
            f"prediction={prediction!r} divides by the signal amplitude at a window's noisy edge, and it is 0 there; "
            'use prediction="velocity" for rectified-flow models'
        )
    scale = edges.alpha_end / edges.alpha_start
    if prediction == "ddim_eps":
        return scale, edges.sigma_end - scale * edges.sigma_start
    gamma = 1.0 / scale
    return scale, -torch.sqrt(1.0 - gamma**2) / gamma


def target(x_win_start: Tensor, x_win_end: Tensor, edges: WindowEdges, prediction: str) -> Tensor:
    """The student's training target, constant over the window; shaped like x_win_start [B, ...]."""
    if prediction == "velocity":
        return (x_win_end - x_win_start) / expand_like(edges.t_end - edges.t_start, x_win_start)
    scale, eta = edge_map(edges, prediction)
    return (x_win_end - expand_like(scale, x_win_start) * x_win_start) / expand_like(eta, x_win_start)


def to_velocity(output: Tensor, x_t: Tensor, t: Tensor, edges: WindowEdges, prediction: str) -> Tensor:
    """The window velocity that a student's output at (x_t, t) stands for.

    For the epsilon forms x_e follows from x_t on the window's straight line, then v = (x_e - x_s) / (t_e - t_s). Unlike
    (x_e - x_t) / (t_e - t) this stays finite at t = t_e.

    Args:
        output: The network's prediction, [B, ...].
        x_t: State, [B, ...].
        t: Times inside the window, edges included, [B], float64.
    """
    if prediction == "velocity":
        return output
    scale, eta = edge_map(edges, prediction)
    done = (t - edges.t_start) / (edges.t_end - edges.t_start)
    rest = 1.0 - done
    divisor = rest + done * scale
    x_win_end = expand_like(scale / divisor, x_t) * x_t + expand_like(rest * eta / divisor, x_t) * output
    x_win_start = (x_win_end - expand_like(eta, x_t) * output) / expand_like(scale, x_t)
    return (x_win_end - x_win_start) / expand_like(edges.t_end - edges.t_start, x_t)


def output_gain(t: Tensor, edges: WindowEdges, prediction: str) -> Tensor:
    """d(velocity) / d(output) of `to_velocity`, [B]: an error of the output is this many times smaller than the velocity's.

    For the epsilon forms eta / ((t_e - t_s) (1 - s + s lambda)) with s = (t - t_s) / (t_e - t_s): the derivative of the
    expression in `to_velocity`. PeRFlow compares outputs ("noise matching"), which is the squared velocity error divided by
    this squared.
    """
    if prediction == "velocity":
        return torch.ones_like(t)
    scale, eta = edge_map(edges, prediction)
    width = edges.t_end - edges.t_start
    done = (t - edges.t_start) / width
    return eta / (width * (1.0 - done + done * scale))


class DDPM:
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
        self.probe_time = float(self.time_of(torch.tensor([1.5]))[0])

    @classmethod
    def from_schedule(cls, name: str = "linear", num_timesteps: int = 1000) -> DDPM:
        """The process of one of `NOISE_SCHEDULES`; raises ValueError for others."""
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

    def ideal(self, data: Tensor, noise: Tensor) -> Tensor:
        return noise

    def to_timestep(self, t: Tensor) -> Tensor:
        # Below the cleanest index the network knows nothing; a float, because raw networks embed any real timestep.
        return (t.to(torch.float64) * self.num_timesteps - 1.0).clamp(min=0.0).to(torch.float32)

    def from_timestep(self, timestep: Tensor) -> Tensor:
        return ((timestep.to(torch.float64) + 1.0) / self.num_timesteps).clamp(0.0, 1.0)

    def states(
        self, output: Output, x: Tensor, times: Tensor, *, method: str = "euler", frame_mask: Tensor | None = None
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
            return output(still(y * expand_like(self.alpha(t), y)), self.to_timestep(t))

        carried = states(slope, x / expand_like(self.alpha(times[0]), x), self.noise_ratio(times), method=method)
        for y, t in zip(carried, times):
            yield still(y * expand_like(self.alpha(t), x))

    def velocity(self, output: Output, prediction: str, bounds: Bounds, x: Tensor, t: Tensor) -> Tensor:
        return to_velocity(output(x, self.to_timestep(t)), x, t, self.edges(*bounds(t)), prediction)

    def output_units(self, prediction: str, bounds: Bounds) -> Callable[[Tensor], Tensor]:
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
