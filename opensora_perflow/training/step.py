"""One step of PeRFlow (arXiv:2405.07510): solve each sample's window by the teacher, and match its straight line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opensora_perflow.method.sampler import carry_to_windows
from opensora_perflow.method.segment import Segment
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.training.blame import NotFinite, check_way
from opensora_perflow.training.players import Batch

Objective = Callable[[Velocity, Segment, Tensor, "Tensor | None"], Tensor]
"""objective(student, segment, t, frame_weights) -> loss [B]."""


class Segments(Protocol):
    """Where segments come from."""

    def of(self, batch: Batch) -> Segment:
        """The teacher's solution of the windows that were drawn."""


Seen = Callable[[Tensor, Tensor, Tensor], None]
"""seen(x, t, v): called with each evaluation of the student."""


def distil(batch: Batch, objective: Objective, segment: Segment, seen: Seen | None = None) -> Tensor:
    """The losses of one step: [B], float32, with the student's graph.

    Args:
        batch: What the host handed over.
        objective: What is minimised at each drawn time, see objectives/.
        segment: The teacher's solution of the windows that were drawn.
        seen: Is shown what the student answers.
    """
    field = batch.players.student.velocity(segment.bounds)

    def student(x: Tensor, t: Tensor) -> Tensor:
        v = field(x, t)
        if seen is not None:
            seen(x, t, v.detach())
        return v

    total = 0.0
    # One evaluation a time, not one with repeated rows: conditions are made for the batch as it is.
    for t, weight in zip(batch.drawn.times, batch.drawn.weights):
        loss = objective(student, segment, t, batch.frame_weights)
        total = total + loss * weight.to(loss.device, loss.dtype)
    return total


@dataclass(frozen=True)
class Solved:
    """Segments that the teacher solves now.

    starts: "student": windows start where the student itself arrives from noise; "diffused": at data with noise.
    solver: A key of SOLVERS.
    source: What the teacher is, in words, for errors.
    """

    starts: str
    solver: str
    source: str

    def of(self, batch: Batch) -> Segment:
        players, times = batch.players, batch.drawn.solver_times
        way: list[Tensor] = []
        x_start = reached(batch, way) if self.starts == "student" else diffused(batch, times[0])
        try:
            states = players.teacher(batch.scale).trajectory(x_start, times, self.solver, self.source)
        except NotFinite:
            check_way(way, batch.drawn.route, batch.drawn.window_idx)
            raise
        units = players.process.output_units(players.prediction, lambda t: (times[0], times[-1]))
        return Segment(states[0], states[-1], times[0], times[-1], states, times, units)


def diffused(batch: Batch, t: Tensor) -> Tensor:
    """Data with the noise of time t [B]; frames that stand still have as little as the process gives them."""
    return held(batch, batch.players.process.add_noise(batch.data, batch.noise, t))


@torch.no_grad()
def reached(batch: Batch, way: list[Tensor] | None = None) -> Tensor:
    """Where the student, sampled with one Euler step a window, reaches each sample's window. `way`: see `carry_to_windows`."""
    drawn, players = batch.drawn, batch.players
    start, whole = held(batch, batch.noise), not players.separable
    return carry_to_windows(players.sampled, start, drawn.route, drawn.window_idx, whole=whole, way=way)


def held(batch: Batch, x: Tensor) -> Tensor:
    """The state with its still frames put where training holds them."""
    process, moving = batch.players.process, batch.players.moving
    if moving is None:
        return x
    still = process.add_noise(batch.data, batch.noise, torch.full_like(batch.drawn.t_start, process.still_time))
    return torch.where(moving[:, None, :, None, None], x, still)
