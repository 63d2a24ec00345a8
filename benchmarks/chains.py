"""Stores of chains for the benchmarks: solved by a world's teacher, written in the package's format, drawn from in passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from worlds import World

from opensora_perflow.hosts.chains import CHAIN
from opensora_perflow.hosts.v1.chain_solver import chain_solver
from opensora_perflow.hosts.v1.stored_chains import chain_bytes
from opensora_perflow.planning.fine_path import FinePath
from opensora_perflow.planning.probe import Probe
from opensora_perflow.planning.windows import added_errors
from opensora_perflow.training.plan_file import windows_of
from opensora_perflow.training.store import ChainStore, ChainWriter, chain_noise

AT_ONCE = {"video": 16}
"""Chains that are solved together, and written as a shard; 8192 in worlds of a closed form."""

COUNTS = "counts"
"""In what Chains.next returns: what each sample's loss counts, [B]."""
LEAST = 0.2
"""Of the draws, that stays alike for all chains."""


@dataclass
class Chains:
    """A store, and what its teacher was told of each chain."""

    folder: Path
    told: dict[str, Tensor]
    names: Tensor
    """What `CHAIN` says of each, [n, 4]."""
    often: Tensor | None = None
    """How often each is drawn, [n], 1 in the mean; None: once in a pass."""
    _order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """model_args of some of the chains."""
        return {name: value[rows] for name, value in self.told.items()} | {CHAIN: self.names[rows]}

    def next(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """model_args of the next `size` chains: every chain once in a pass, or as `often` says, in an order of its own."""
        while len(self._order) < size:
            turns = torch.randperm(len(self), generator=generator)
            if self.often is not None:
                places = turns + torch.rand(len(self), generator=generator, dtype=torch.float64)
                turns = torch.searchsorted(self.often.double().cumsum(0), places).clamp(max=len(self) - 1)
            self._order = torch.cat([self._order, turns])
        rows, self._order = self._order[:size], self._order[size:]
        return self.batch(rows) | ({} if self.often is None else {COUNTS: 1.0 / self.often[rows]})

    def draw_by(self, errors: Tensor) -> None:
        """Draw each chain as often as its error [n] is large. Losses count the less for that: their mean stays the same."""
        self.often, self._order = LEAST + (1.0 - LEAST) * errors / errors.mean(), self._order[:0]

    def first(self, count: int) -> Chains:
        """A part of the store."""
        return Chains(self.folder, {name: value[:count] for name, value in self.told.items()}, self.names[:count])


def needed_shares(world: World, network: nn.Module, chains: Chains, edges: Sequence[float], count: int = 512) -> list[float]:
    """Shares by which a student draws its windows: what each of them adds to the error at the end (planning/windows.py).

    Args:
        network: A pilot student. edges: Of its windows, which are the store's. count: Chains that are followed.
    """
    store, count = ChainStore(chains.folder), min(count, len(chains))
    rows, told = torch.arange(count), chains.batch(torch.arange(count))
    del told[CHAIN]
    times = torch.tensor(edges, dtype=torch.float64)
    states = torch.stack([store.states(rows, place.expand(count)) for place in store.nearest(times)]).to(world.device)
    flow_times = times[:, None].expand(-1, count)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return -network(x, 1000 * t.to(x), **told)[:, : x.shape[1]]

    path = FinePath(times, flow_times, states, torch.empty(0))
    added = added_errors(Probe(velocity, states[0]), path)
    return [round(one / sum(added), 4) for one in added]


@torch.no_grad()
def chain_errors(world: World, network: nn.Module, chains: Chains, config: Mapping[str, Any]) -> Tensor:
    """How far a student's steps end from the teacher's, of each chain: root mean square of a window, mean by their shares, [n].

    config: The student's scheduler keys; its windows are the store's.
    """
    store, windows = ChainStore(chains.folder), windows_of(config["windows"])
    edges, shares = windows.edges, config["draws"].get("shares") or [1.0] * windows.num_windows
    errors = []
    for rows in torch.arange(len(chains)).split(8192):
        told, total = chains.batch(rows), torch.zeros(len(rows))
        del told[CHAIN]
        for k, share in enumerate(shares):
            x, end = (store.states(rows, torch.full_like(rows, place)).to(world.device) for place in (k, k + 1))
            velocity = network(x, torch.full((len(rows),), 1000.0 * edges[k], device=world.device), **told)[:, : x.shape[1]]
            slope = (x - end) / (edges[k + 1] - edges[k])
            total += share * (velocity - slope).square().flatten(1).mean(dim=1).sqrt().cpu()
        errors.append(total)
    return torch.cat(errors)


def solve(
    world: World, folder: Path, count: int, seed: int, settings: Mapping[str, Any], dtypes: Sequence[str] = ("float16",),
    further: int = 0,
) -> Chains:  # fmt: skip
    """Solve chains of a training with these scheduler keys, and write a store of each dtype into folder/dtype.

    further: Solutions of the first window that each chain has besides its own.
    """
    solver = chain_solver(world.scheduler(settings), world.teacher, None, seed, torch.float32)
    writers = [ChainWriter(folder / dtype, replace(solver.origin, dtype=dtype, first_window=further)) for dtype in dtypes]
    generator, told = torch.Generator().manual_seed(seed), []
    at_once = AT_ONCE.get(world.name, 8192)
    for number, first in enumerate(range(0, count, at_once)):
        rows = min(at_once, count - first)
        _, args = world.batch(rows, generator)
        told.append(args)
        noise = torch.stack([chain_noise(seed, first + row, world.latent_shape) for row in range(rows)])
        ends, _ = solver.ends(noise, args, first)
        more = [
            solver.ends(
                torch.stack([chain_noise(seed, first + row, world.latent_shape, one) for row in range(rows)]), args, first, 1
            )
            for one in range(1, further + 1)
        ]
        for writer in writers:
            more_ends = torch.cat([states for states, _ in more], dim=1) if more else None
            writer.write(number, first, ends, [""] * rows, {}, further=more_ends)
    names = torch.stack([chain_bytes(chain) for chain in range(count)])
    return Chains(folder / dtypes[0], {name: torch.cat([args[name] for args in told]) for name in told[0]}, names)
