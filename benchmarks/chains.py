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
from opensora_perflow.training.store import ChainStore, ChainWriter, chain_noise

AT_ONCE = {"video": 16}
"""Chains that are solved together, and written as a shard; 8192 in worlds of a closed form."""


@dataclass
class Chains:
    """A store, and what its teacher was told of each chain."""

    folder: Path
    told: dict[str, Tensor]
    names: Tensor
    """What `CHAIN` says of each, [n, 4]."""
    _order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """model_args of some of the chains."""
        return {name: value[rows] for name, value in self.told.items()} | {CHAIN: self.names[rows]}

    def next(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """model_args of the next `size` chains: every chain once in a pass, in an order of its own."""
        while len(self._order) < size:
            self._order = torch.cat([self._order, torch.randperm(len(self), generator=generator)])
        rows, self._order = self._order[:size], self._order[size:]
        return self.batch(rows)

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
