"""Stores of chains for the benchmarks: solved by a world's teacher, written in the package's format, drawn from in passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from worlds import World

from opensora_perflow.hosts.v1.chain_solver import ChainSolver
from opensora_perflow.hosts.v1.stored_chains import CHAIN, chain_bytes
from opensora_perflow.training.store import ChainWriter, chain_noise

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


def solve(
    world: World, folder: Path, count: int, seed: int, settings: Mapping[str, Any], dtypes: Sequence[str] = ("float16",)
) -> Chains:
    """Solve chains of a training with these scheduler keys, and write a store of each dtype into folder/dtype."""
    solver = ChainSolver(world.scheduler(settings), world.teacher, None, seed, torch.float32)
    writers = [ChainWriter(folder / dtype, replace(solver.origin, dtype=dtype)) for dtype in dtypes]
    generator, told = torch.Generator().manual_seed(seed), []
    at_once = AT_ONCE.get(world.name, 8192)
    for number, first in enumerate(range(0, count, at_once)):
        rows = min(at_once, count - first)
        _, args = world.batch(rows, generator)
        told.append(args)
        noise = torch.stack([chain_noise(seed, first + row, world.latent_shape) for row in range(rows)])
        ends, _ = solver.ends(noise, args, first)
        for writer in writers:
            writer.write(number, first, ends, [""] * rows, {})
    names = torch.stack([chain_bytes(chain) for chain in range(count)])
    return Chains(folder / dtypes[0], {name: torch.cat([args[name] for args in told]) for name in told[0]}, names)
