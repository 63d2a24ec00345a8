"""Players: networks in the conditions of one batch. Teacher, student and every helper network of an objective are players."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from opensora_perflow.method.draws import Drawn
from opensora_perflow.method.process import Bounds, Output, Process
from opensora_perflow.method.solvers import Velocity, hold_frames
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.training.blame import bad_solution


@dataclass(frozen=True, eq=False)
class Player:
    """A network as a field of state and time: conditions and guidance are inside, and nothing else calls a network.

    output: What the network says, guided, see `process.Output`.
    process: The noising process that the network was trained on.
    prediction: What a student's output stands for, one of process.predictions.
    moving: bool [B, T]; False marks frames that stand still. None: all move.
    two_time: Is the network also told how long the step is that begins at t: to the clean edge of its window?
    """

    output: Output
    process: Process
    prediction: str
    moving: Tensor | None = None
    two_time: bool = False

    def velocity(self, bounds: Bounds | None) -> Velocity:
        """dx/dt of a student: the straight line of the window that `bounds` says t lies in."""

        def told(x: Tensor, t: Tensor) -> Tensor:
            output = partial(self.output, step=t - bounds(t)[1])
            return self.process.velocity(output, self.prediction, bounds, x, t)

        field = told if self.two_time else partial(self.process.velocity, self.output, self.prediction, bounds)
        return field if self.moving is None else hold_frames(field, self.moving)

    @torch.no_grad()  # not inference_mode: the host's networks cache embeddings, which the student would meet in its graph
    def trajectory(self, x: Tensor, times: Tensor, solver: str, source: str) -> Tensor:
        """States at times [S + 1, B] of the ODE that a teacher follows from x [B, ...]: [S + 1, B, ...].

        Args:
            solver: A key of SOLVERS.
            source: What the teacher is, in words, for errors.

        Raises:
            NotFinite: the last states are not finite.
        """
        states = torch.stack(list(self.process.states(self.output, x, times, method=solver, frame_mask=self.moving)))
        if not torch.isfinite(states[-1]).all():
            raise bad_solution(states, times, source)
        return states


class Players(Protocol):
    """The players of one batch; whoever builds them knows their host. Networks are those of the time of asking."""

    process: Process
    prediction: str
    moving: Tensor | None
    """Those of the student, see `Player`."""

    student: Player
    """As it is trained."""

    separable: bool
    """Can players be had for some of the samples alone?"""

    def sampled(self, window: int, rows: Tensor | None = None) -> Velocity:
        """The student as a sampler runs it in a window, guided where sampling is; of the samples `rows` [n] alone, if given."""

    def teacher(self, scale: float | Tensor) -> Player:
        """The teacher, guided with one scale, or with one a sample [B]."""

    def untrained(self) -> Player:
        """The teacher's network in the student's part: a student before its first step."""


@dataclass(frozen=True)
class Batch:
    """What a host hands over for one step, in the method's own words.

    data, noise: [B, ...], float32; noise is the state at t = 1, zeros where `chains` say it.
    windows: The student's windows, warped for each sample.
    drawn: This step's windows and times.
    players: See `Players`.
    scale: The teacher's guidance in this step: one scale, or one a sample [B], float64.
    frame_weights: Loss weight of each frame, [B, T]; None: equal.
    chains: Which stored chain each sample is, int64 [B], see store.py; None: they are none.
    inputs: Gives what else the networks are told, name in words -> tensor [B, ...] or number, for errors (see blame.py).
    """

    data: Tensor
    noise: Tensor
    windows: WarpedWindows
    drawn: Drawn
    players: Players
    scale: float | Tensor
    frame_weights: Tensor | None = None
    chains: Tensor | None = None
    inputs: Callable[[], Mapping[str, Any]] = dict
