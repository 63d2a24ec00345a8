"""Students of stored chains against students whose teacher solves at every step: cost of a step, and error at equal CPU seconds.

    python benchmarks/stored.py [--part step equal chains dtype] [--world mixture video] [--seeds 0 1 2] [--out FOLDER]

Everything goes through the PeRFlow object: `training_losses` takes stored chains as Open-Sora's train.py hands them over, from
float16 safetensors with checksums in a temporary folder. Counted are CPU seconds of the process, on one thread; a store's own
solution, writing and first reading are in them. Students start as the teacher and are trained by distil.py.

step    CPU seconds of a training step (loss, gradient, Adam), online and stored in turns.
equal   A training online gets so many steps. Stored chains are solved and trained from until the same CPU seconds are used. Both
        are shown with each of two peak learning rates; the one to compare is each one's best.
chains  On the video model, so many steps from stores of several sizes: the error on noise that was not stored, and on the first
        chains of the store.
dtype   Students of the same chains in float32, float16 and bfloat16: the rounding itself, and what it does to the students.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from distil import distil
from few_step import SCALES, Evaluation, Scale, make_world, set_up_process
from torch import Tensor
from worlds import World

from opensora_perflow.atomic import replacing
from opensora_perflow.hosts.v1.chain_solver import ChainSolver
from opensora_perflow.hosts.v1.stored_chains import CHAIN, chain_bytes
from opensora_perflow.method.metrics import endpoint_error
from opensora_perflow.training.store import DTYPES, ChainStore, ChainWriter

SAMPLES = {"mixture": 2048, "video": 64}
"""That are compared."""
STEPS = {"mixture": 2000, "video": 150}
"""Of the online training of part equal."""
CHAINS = {"mixture": 16384, "video": 640}
"""Of the store of part equal."""
RATES = (1.0, 3.0)
"""Peak learning rates, over few_step.py's."""
SIZES = (96, 192, 384, 768, 1536)
"""Of the stores of part chains."""
TRAINED = 300
"""Steps of part chains and of part dtype on the video model."""


@dataclass(frozen=True)
class Chains:
    """A store and what its teacher was told of each chain."""

    folder: Path
    told: dict[str, Tensor]
    count: int

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """model_args of some of the chains."""
        return {name: value[rows] for name, value in self.told.items()} | {CHAIN: self.names[rows]}

    @property
    def names(self) -> Tensor:
        return torch.stack([chain_bytes(chain) for chain in range(self.count)])


def settings(world: World, **others: Any) -> dict[str, Any]:
    return dict(watch=None, windows=4, guidance=dict(mode="fixed", scale=world.guidance), **others)


def solve(world: World, folder: Path, count: int, batch_size: int, seed: int, dtypes: Sequence[str] = ("float16",)) -> Chains:
    """Solve chains, and write a store of each dtype into folder/dtype."""
    solver = ChainSolver(world.scheduler(settings(world)), world.teacher, None, seed, torch.float32)
    writers = {dtype: ChainWriter(folder / dtype, replace(solver.origin, dtype=dtype)) for dtype in dtypes}
    generator, told = torch.Generator().manual_seed(seed), []
    for number, first in enumerate(range(0, count, batch_size)):
        rows = min(batch_size, count - first)
        _, args = world.batch(rows, generator)
        told.append(args)
        from opensora_perflow.training.store import chain_noise

        noise = torch.stack([chain_noise(seed, first + row, world.latent_shape) for row in range(rows)])
        ends, _ = solver.ends(noise, args, first)
        for writer in writers.values():
            writer.write(number, first, ends, [""] * rows, {})
    return Chains(folder / dtypes[0], {name: torch.cat([args[name] for args in told]) for name in told[0]}, count)
