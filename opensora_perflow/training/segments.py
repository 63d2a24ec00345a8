"""Where a step's segments come from: the teacher solves them now, or a store has them (store.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from opensora_perflow.conventions import shift_time, unshift_time
from opensora_perflow.method.sampler import carry_to_windows
from opensora_perflow.method.segment import Segment
from opensora_perflow.training.blame import NotFinite, check_way
from opensora_perflow.training.players import Batch
from opensora_perflow.training.recipe import Guidance
from opensora_perflow.training.store import ChainStore


class Segments(Protocol):
    """Where segments come from."""

    def of(self, batch: Batch) -> Segment:
        """The teacher's solution of the windows that were drawn."""

    def noise(self, batch: Batch, seed: int) -> Tensor:
        """States at t = 1 from which the teacher's path through all windows is known, or is to be solved."""

    def edge(self, batch: Batch, guidance: Guidance, x: Tensor, times: Tensor, k: int) -> Tensor:
        """The teacher's state at the clean edge of window k, on its way from `noise`.

        Args:
            x: Its state at the noisy edge, [B, ...].
            times: Its steps in the window, [S + 1, B].
        """


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
        players, times, units = batch.players, batch.drawn.solver_times, _units(batch)
        way: list[Tensor] = []
        x_start = reached(batch, way) if self.starts == "student" else diffused(batch, times[0])
        try:
            states = players.teacher(batch.scale).trajectory(x_start, times, self.solver, self.source)
        except NotFinite:
            check_way(way, batch.drawn.route, batch.drawn.window_idx)
            raise
        return Segment(states[0], states[-1], times[0], times[-1], states, times, units)

    def noise(self, batch: Batch, seed: int) -> Tensor:
        # None of it from the generator that training draws from.
        return torch.randn(batch.noise.shape, generator=torch.Generator().manual_seed(seed)).to(batch.noise)

    def edge(self, batch: Batch, guidance: Guidance, x: Tensor, times: Tensor, k: int) -> Tensor:
        # Scales of mode range hold in all windows; else each window has its own.
        window_idx = torch.full((len(x),), k, device=x.device)
        scale = batch.scale if guidance.mode == "range" else guidance.scale_in(window_idx)
        return batch.players.teacher(scale).trajectory(x, times, self.solver, self.source)[-1]


@dataclass(frozen=True)
class Stored:
    """Segments of a store's chains, among whose edges the student's are: no teacher is asked.

    generator: Draws which solution of a first window is taken, each as often; None: the chain's own.
    """

    store: ChainStore
    generator: torch.Generator | None = None

    def of(self, batch: Batch) -> Segment:
        drawn, ratio = batch.drawn, batch.windows.ratio
        u = unshift_time(torch.cat([drawn.t_start, drawn.t_end]), None if ratio is None else ratio.repeat(2))
        starts, ends = self.store.nearest(u).chunk(2)
        further, over_data = self._further(starts, ends), self.store.over_data
        # Starts, or the noise in them, and ends together: each file is asked once.
        places = torch.cat([torch.zeros_like(starts) if over_data else starts, ends])
        chains, further = (torch.cat([value, value]) for value in (batch.chains, further))
        x_start, x_end = self.store.states(chains, places, further).to(batch.noise).chunk(2)
        if over_data:
            data = self.store.data(batch.chains).to(x_start)
            x_start = diffused(replace(batch, data=data, noise=x_start), drawn.t_start)
        return Segment(x_start, x_end, drawn.t_start, drawn.t_end, units=_units(batch))

    def _further(self, starts: Tensor, ends: Tensor) -> Tensor:
        """The solution that each sample's window is of, from places of its edges [B]; see ChainStore.states."""
        if self.generator is None or not self.store.origin.first_window:
            return torch.zeros_like(starts)
        drawn = torch.randint(self.store.origin.first_window + 1, starts.shape, generator=self.generator)
        return torch.where((starts == 0) & (ends == 1), drawn, 0)

    def noise(self, batch: Batch, seed: int) -> Tensor:
        return self.store.states(batch.chains, torch.zeros_like(batch.chains)).to(batch.noise)

    def edge(self, batch: Batch, guidance: Guidance, x: Tensor, times: Tensor, k: int) -> Tensor:
        places = self.store.nearest(unshift_time(times[-1], batch.windows.ratio))
        return self.store.states(batch.chains, places).to(x)


def _units(batch: Batch) -> Callable[[Tensor], Tensor] | None:
    """See Segment.units."""
    players, drawn = batch.players, batch.drawn
    if players.prediction == "velocity":
        return None
    return players.process.output_units(players.prediction, lambda t: (drawn.t_start, drawn.t_end))


def path_times(grids: Tensor, like: Tensor, ratio: Tensor | None) -> Tensor:
    """The teacher's steps [K, S + 1], untransformed -> flow times of each sample of `like` [B, ...]: [K, S + 1, B]."""
    return shift_time(grids.to(like.device)[:, :, None].expand(-1, -1, len(like)), ratio)


@torch.no_grad()
def teacher_path(start: Tensor, times: Tensor, solve: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """The teacher's states at the window edges, [K + 1, B, ...].

    Args:
        start: States at t = 1, [B, ...].
        times: See `path_times`.
        solve: (x [B, ...], times [S + 1, B], k) -> the state at the last of those times in window k.
    """
    states = [start]
    for k, window_times in enumerate(times):
        states.append(solve(states[-1], window_times, k))
    return torch.stack(states)


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
