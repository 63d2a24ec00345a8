"""ODE steps for dx/dt = velocity(x, t), and the one loop that takes them."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.conventions import expand_like

Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Solver:
    """One explicit step: `step(velocity, x, t, t_next)`; `order` of its global error; field calls per step."""

    step: Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]
    order: int
    evaluations: int


def euler_step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """x + dt v(x, t)."""
    return x + expand_like(t_next - t, x) * velocity(x, t)


def heun_step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Explicit trapezoid: the mean of the velocities at both ends of an Euler step."""
    dt = expand_like(t_next - t, x)
    v = velocity(x, t)
    v_next = velocity(x + dt * v, t_next)
    return x + dt * (v + v_next) / 2


def midpoint_step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Velocity at the middle of the step, reached by half an Euler step."""
    dt = expand_like(t_next - t, x)
    x_mid = x + dt / 2 * velocity(x, t)
    return x + dt * velocity(x_mid, (t + t_next) / 2)


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler_step, order=1, evaluations=1),
    "heun": Solver(heun_step, order=2, evaluations=2),
    "midpoint": Solver(midpoint_step, order=2, evaluations=2),
}


def remember_last(velocity: Velocity) -> Velocity:
    """The field, evaluated once where it is asked twice in a row for the same state, times and use of gradients."""
    last: list[tuple[Tensor, Tensor, bool, Tensor]] = []

    def remembering(x: Tensor, t: Tensor) -> Tensor:
        graph = torch.is_grad_enabled()
        if last and last[0][2] == graph and torch.equal(last[0][0], x) and torch.equal(last[0][1], t):
            return last[0][3]
        last[:] = [(x, t, graph, velocity(x, t))]
        return last[0][3]

    return remembering


def hold_frames(velocity: Velocity, frame_mask: Tensor) -> Velocity:
    """The field with zero velocity on frames [B, T] that are False in the mask: they stand still, whatever it says there."""
    moving = frame_mask[:, None, :, None, None]

    def held(x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x, t)
        return v.where(moving, v.new_zeros(()))

    return held


def solve(velocity: Velocity, x: Tensor, times: Tensor, *, method: str = "euler") -> Tensor:
    r"""Follow a velocity field along a grid of times; see `states`, of which this is the last."""
    return deque(states(velocity, x, times, method=method), maxlen=1).pop()


def states(velocity: Velocity, x: Tensor, times: Tensor, *, method: str = "euler") -> Iterator[Tensor]:
    r"""Follow a velocity field along a grid of times.

    Every batch element has its own grid (its own window, its own warp), so unequal windows need no special case.

    Args:
        velocity: Field; called as velocity(x, t) with x [B, ...] and t [B], at grid points (and, for midpoint, between them).
        x: State at times[0], [B, ...], float32 or float64.
        times: [S + 1, B], float64, monotone along the first axis. Field calls: S times the solver's `evaluations`.
        method: A key of SOLVERS.

    Yields:
        The states at times[0] (x itself), times[1], ..., one at a time; shape and dtype of `x`. Gradients flow; callers wrap
        a teacher in no_grad.

    Raises:
        ValueError: unknown method.

    Source: PeRFlow (arXiv:2405.07510), section 3: the teacher's ODE solved inside a window.
    """
    if method not in SOLVERS:
        raise ValueError(f"unknown solver {method!r}; known: {', '.join(SOLVERS)}")
    step = SOLVERS[method].step
    yield x
    for t, t_next in zip(times, times[1:]):
        x = step(velocity, x, t, t_next)
        yield x
