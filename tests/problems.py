"""Solved cases: velocity fields that carry their exact solution and count their calls."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def _expand(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


@dataclass
class Constant:
    """v = c: every method is exact."""

    c: float = 0.7
    calls: int = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return torch.full_like(x, self.c)

    def exact(self, x: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
        return x + self.c * _expand(t_end - t, x)


@dataclass
class LinearInTime:
    """v = 2 t: the error of n Euler steps is exactly -(t_end - t)^2 / n; heun and midpoint are exact."""

    calls: int = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return (2 * _expand(t, x)).expand_as(x)

    def exact(self, x: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
        return x + _expand(t_end**2 - t**2, x)


@dataclass
class LinearInState:
    """v = a x: exponential."""

    a: float = 1.3
    calls: int = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.a * x

    def exact(self, x: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
        return x * torch.exp(self.a * _expand(t_end - t, x))


@dataclass
class Gaussian:
    """The rectified flow of data N(m, s^2) on the straight path: x_t has mean (1 - t) m and variance (1-t)^2 s^2 + t^2."""

    m: float = 0.8
    s: float = 0.4
    calls: int = 0

    def std(self, t: Tensor) -> Tensor:
        return torch.sqrt((1 - t) ** 2 * self.s**2 + t**2)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        t = _expand(t, x)
        return -self.m + (t - (1 - t) * self.s**2) / self.std(t) ** 2 * (x - (1 - t) * self.m)

    def exact(self, x: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
        t, t_end = _expand(t, x), _expand(t_end, x)
        return (1 - t_end) * self.m + self.std(t_end) / self.std(t) * (x - (1 - t) * self.m)

    def window_velocity(self, x_t: Tensor, t: Tensor, t_start: Tensor, t_end: Tensor) -> Tensor:
        """What PeRFlow converges to: on a window's straight lines x_start is a function of x_t, since no two of them cross."""
        t, t_start, t_end = (_expand(time, x_t) for time in (t, t_start, t_end))
        ratio = self.std(t_end) / self.std(t_start)
        shift = (1 - t_end) * self.m - ratio * (1 - t_start) * self.m  # x_end = ratio x_start + shift
        done = (t - t_start) / (t_end - t_start)
        x_start = (x_t - done * shift) / (1 + done * (ratio - 1))
        return ((ratio - 1) * x_start + shift) / (t_end - t_start)


def log_slope(steps: list[int], errors: list[float]) -> float:
    """Slope of log error against log step size (1 / steps), by least squares."""
    x = [math.log(1 / n) for n in steps]
    y = [math.log(e) for e in errors]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)
