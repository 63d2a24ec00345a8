r"""What a student outputs for a window, its training target, and the way back to the window's velocity.

A window carries x_s (noisy edge t_s) to x_e (clean edge t_e) on a straight line. The diffusion path the teacher knows has
signal and noise amplitudes alpha, sigma at both edges. With lambda = alpha_e / alpha_s the three parametrisations are

    velocity    v   = (x_e - x_s) / (t_e - t_s)
    ddim_eps    eps = (x_e - lambda x_s) / eta,  eta = sigma_e - lambda sigma_s            (a DDIM step's own epsilon)
    diff_eps    eps = (x_e - lambda x_s) / eta,  eta = -sqrt(1 - gamma^2) / gamma,  gamma = alpha_s / alpha_e

Source: PeRFlow (arXiv:2405.07510), section 3 and its public training scripts (velocity / ddim_eps / diff_eps).
The two epsilon forms need alpha_s > 0, so a path that is pure noise at t = 1 (rectified flow) has only the velocity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.conventions import expand_like

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

    For the epsilon forms x_e follows from x_t on the window's straight line, then v = (x_e - x_s) / (t_e - t_s); unlike
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
