"""How far the student is from its teacher, on batches that the run keeps from its beginning: is training still helping?

A training loss cannot tell: its times, states and batches are drawn anew, and its states move with the student. Here the
teacher's path from fixed noise is solved once. A run watches where the student's own few steps end, since samples show that.
Errors of single windows can fall while what they add up to rises. The same steps of a network that was not trained at all are
what it has to beat. A curriculum's stage looks at single windows, which are what it changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.method.process import Bounds
from opensora_perflow.method.sampler import carry_to_windows
from opensora_perflow.method.segment import Segment
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.objectives import mean_over_frames, perflow
from opensora_perflow.training.host import Host
from opensora_perflow.training.players import Batch
from opensora_perflow.training.recipe import Guidance
from opensora_perflow.training.segments import Segments, held, path_times, teacher_path
from opensora_perflow.training.watch import ENOUGH, TIE, Estimate, Seen, Watch, WatchSettings

FieldWithin = Callable[[Bounds], Velocity]
"""A student's field, given where the window of a time begins and ends."""


@dataclass
class HeldOutBatch:
    """Noise and conditions of one batch, and the teacher's path from there.

    Args:
        start: States at t = 1, [B, ...].
        solve: (x [B, ...], times [S + 1, B], k) -> the teacher's state at the last of those times in window k, [B, ...].
        student: The student's field on this batch.
        untrained: The field that a student has which is still its teacher's copy.
        frame_weights: [B, T], see `objectives.mean_over_frames`.
        ratio: [B], the warp of the windows' edges; None where there is none.
    """

    start: Tensor
    solve: Callable[[Tensor, Tensor, int], Tensor]
    student: FieldWithin
    untrained: FieldWithin
    frame_weights: Tensor | None = None
    ratio: Tensor | None = None
    states: Tensor | None = None
    """The teacher's at the window edges, [K + 1, B, ...]; None before they are needed."""
    untrained_end: Tensor | None = None
    """The untrained network's `squared_ends`; None before they are needed."""

    @torch.no_grad()
    def velocity_error(self, grids: Tensor) -> float:
        """`held_out_error` of the student.

        Args:
            grids: The teacher's steps in each window, [K, S + 1], float64, untransformed. The path is solved along them at the
                first call only; `forget` it where they, or the teacher, change.
        """
        edges = self._solve(grids)
        return held_out_error(self.student(self.bounds(edges)), self.states, edges, self.frame_weights)

    @torch.no_grad()
    def squared_ends(self, grids: Tensor) -> tuple[Tensor, Tensor]:
        """How far from the teacher's end one step a window leads, the student's and an untrained network's. Mean squares over
        elements, one a sample [B], float64. `grids` as above."""
        edges = self._solve(grids)
        if self.untrained_end is None:
            self.untrained_end = self._end_error(self.untrained, edges)
        return self._end_error(self.student, edges), self.untrained_end

    @torch.no_grad()
    def slopes(self, grids: Tensor) -> list[float]:
        """Root mean squares of the windows' lines on the teacher's path, one a window; `grids` as above.

        Raises:
            NotFinite: see players.Player.trajectory.
        """
        edges = self._solve(grids)
        lengths = (self.states.diff(dim=0).flatten(2).square().mean(dim=2)).sqrt() / edges.diff(dim=0).abs()
        return lengths.square().mean(dim=1).sqrt().tolist()

    def forget(self) -> None:
        """The windows or the teacher have changed."""
        self.states = self.untrained_end = None

    def _solve(self, grids: Tensor) -> Tensor:
        """The edges of each sample, [K + 1, B]; `states` hold the teacher's states there."""
        times = path_times(grids, self.start, self.ratio)
        if self.states is None:
            self.states = teacher_path(self.start, times, self.solve)
        return torch.cat([times[:, 0], times[-1:, -1]])

    @staticmethod
    def bounds(edges: Tensor) -> Bounds:
        """Which of the windows between edges [K + 1, B] a time lies in that is one of the edges."""

        def bounds(t: Tensor) -> tuple[Tensor, Tensor]:
            window_idx = ((edges >= t).sum(dim=0) - 1)[None]  # t is one of the edges, to the last bit
            return edges.gather(0, window_idx)[0], edges.gather(0, window_idx + 1)[0]

        return bounds

    def _end_error(self, field_within: FieldWithin, edges: Tensor) -> Tensor:
        last = torch.full((len(self.start),), len(edges) - 1)
        velocity = field_within(self.bounds(edges))
        x = carry_to_windows(lambda window, rows: velocity, self.start, edges, last, whole=True)
        return mean_over_frames((x - self.states[-1]).square(), self.frame_weights).double().cpu()


def held_out_error(student: Velocity, states: Tensor, times: Tensor, frame_weights: Tensor | None = None) -> float:
    """How far one step of the student across each window ends from the teacher, per unit of time: a velocity's error.

    Args:
        student: The student's field, called once a window; callers wrap in no_grad.
        states: The teacher's states at the edges of a stage, [K + 1, B, ...], on its way down from noise.
        times: The edges, [K + 1, B], float64.
        frame_weights: [B, T], see `objectives.mean_over_frames`.

    Returns:
        Root mean square over samples, windows and elements.
    """
    losses = [
        perflow(student, Segment(x_start, x_end, t_start, t_end), t_start, frame_weights).mean()
        for x_start, x_end, t_start, t_end in zip(states, states[1:], times, times[1:])
    ]
    return torch.stack(losses).mean().sqrt().item()


FEW = 10
"""Losses that are compared, at the beginning and now."""


class Monitor:
    """Measures a run on the first samples of its beginning.

    Args:
        watch: When, and what it warns of; None: a curriculum alone measures.
        rank, shares: Data-parallel rank, and how many there are.
    """

    def __init__(self, watch: WatchSettings | None, rank: int = 0, shares: int = 1) -> None:
        self.watch = None if watch is None else Watch(watch)
        self.rank, self.shares = rank, shares
        self.batches: list[HeldOutBatch] = []
        self._best: Tensor | None = None
        """Squared errors of the best measurement, one a sample."""
        self._count = 0
        self._first_losses: list[Tensor] = []
        self._last_losses: deque[Tensor] = deque(maxlen=FEW)

    @property
    def needs_samples(self) -> bool:
        """Are there too few to judge by? A curriculum alone takes one batch."""
        if not self.batches or self.watch is None:
            return not self.batches
        return sum(len(held.start) for held in self.batches) * self.shares < ENOUGH

    def keep(self, batch: Batch, guidance: Guidance, segments: Callable[[], Segments]) -> None:
        """Measure on this batch's conditions and shapes from now on, from noise of its own, or on its stored chains.

        `segments()` is asked at every solution: a curriculum changes what a run's teacher is.
        """
        players = batch.players
        noise = segments().noise(batch, len(self.batches) + 1_000_003 * self.rank)
        held_out = HeldOutBatch(
            held(batch, noise),
            solve=lambda x, times, k: segments().edge(batch, guidance, x, times, k),
            student=lambda bounds: players.student.velocity(bounds),
            untrained=lambda bounds: players.untrained().velocity(bounds),
            frame_weights=batch.frame_weights,
            ratio=batch.windows.ratio,
        )
        self.batches.append(held_out)

    def note_loss(self, loss: Tensor) -> None:
        """A step's losses [B], to tell later whether they rise. Not read now: that would wait for the GPU."""
        losses = self._first_losses if len(self._first_losses) < FEW else self._last_losses
        losses.append(loss.detach().mean())

    def observe(self, steps: int, grids: Tensor, host: Host) -> tuple[int, str, Seen]:
        """Level and text of what the log should say of the ends of the student's steps, see `Watch.observe`; and the
        numbers."""
        ends = [held.squared_ends(grids) for held in self.batches]
        error, untrained = (torch.cat(values) for values in zip(*ends))
        count = round(self._over_ranks(host)(float(len(error))) * self.shares)

        def estimate(values: Tensor) -> Estimate:
            return Estimate.of(values, self._over_ranks(host), count)

        if count != self._count:  # of all processes, so that all of them do the same
            self._count, self._best = count, None
            self.watch.restart()
        tolerated = (1 + self.watch.rule.tolerance) ** 2
        before = self.watch.best
        seen = Seen(
            count,
            estimate(error).root(),
            estimate(untrained).root(),
            worse=estimate(error - (1 + TIE) ** 2 * untrained),
            far=estimate(error - tolerated * untrained),
            rise=None if self._best is None else estimate(error - tolerated * self._best),
            spikes=self._spikes(),
        )
        level, text = self.watch.observe(steps, seen)
        if self.watch.best < before:
            self._best = error
        return level, text, seen

    def velocity_error(self, grids: Tensor, host: Host) -> float:
        """`HeldOutBatch.velocity_error` on the first batch, over processes, each of which has to call it."""
        return self._over_ranks(host)(self.batches[0].velocity_error(grids))

    def restart(self) -> None:
        """The windows or the teacher have changed: errors from here on do not compare with those before."""
        for batch in self.batches:
            batch.forget()
        self._best = None
        self._first_losses.clear()
        self._last_losses.clear()
        if self.watch is not None:
            self.watch.restart()

    def _spikes(self) -> bool:
        """Is the median of the last losses of this process more than twice that of the first? It changes words alone."""
        if len(self._last_losses) < FEW:
            return False
        first, last = (torch.stack(list(losses)).median().item() for losses in (self._first_losses, self._last_losses))
        return last > 2 * first

    def _over_ranks(self, host: Host) -> Callable[[float], float]:
        device = self.batches[0].start.device
        return lambda value: host.mean(value, device)
