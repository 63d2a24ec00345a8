"""Stored chains, whichever host's they are: which a store holds, their solution, and whether a store fits a training."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from opensora_perflow.hosts.parallel import gathered
from opensora_perflow.training.players import Batch
from opensora_perflow.training.randomness import step_generator
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.run import TrainingRun
from opensora_perflow.training.segments import diffused, path_times, teacher_path
from opensora_perflow.training.store import DTYPES, SHARD_BYTES, ChainStore, Origin, chain_noise, told_of

logger = logging.getLogger("opensora_perflow")

CHAIN = "perflow_chain"
"""Name of each sample's chain in a batch."""
MOST_ROWS = 64
"""Chains of a shard."""


@dataclass(frozen=True)
class Part:
    """Chains of one size.

    captions: Of each. told: What else the teacher is told of them, see `ChainWriter.write`. latent: C, T, H, W of latents.
    batch_size: How many are solved at once. rows: Of the data set. data: Clean latents [n, C, T, H, W] at which windows start
    with noise; None: they start at noise.
    """

    captions: Sequence[str]
    told: Mapping[str, Any]
    latent: tuple[int, ...]
    batch_size: int
    rows: Sequence[int] = ()
    data: Tensor | None = None

    def of(self, places: Sequence[int]) -> Part:
        """Some of its chains."""
        captions, rows = ([every[place] for place in places if every] for every in (self.captions, self.rows))
        data = None if self.data is None else self.data[list(places)]
        return replace(self, captions=captions, rows=rows, told=told_of(self.told, places), data=data)


@dataclass(frozen=True)
class ChainSolver:
    """Solves chains by a recipe's teacher.

    run: Whose teacher and windows count. origin: Of the chains.
    arguments: What the host tells networks of a part's chains.
    batch: (noise [B, ...], arguments, generator of scales) -> a training's batch, from this noise.
    """

    run: TrainingRun
    origin: Origin
    arguments: Callable[[Part], Any]
    batch: Callable[[Tensor, Any, torch.Generator], Batch]

    def solve(self, part: Part, first: int) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
        """The part's chains first, first + 1, ..., batch by batch.

        Yields:
            Ends [n, K, C, T, H, W]; scales [n], where they are drawn; further states at the first clean edge
            [n, M, C, T, H, W], where the origin has any; the part's data.
        """
        for start in range(0, len(part.captions), part.batch_size):
            batch = part.of(range(start, min(start + part.batch_size, len(part.captions))))
            arguments, chains = self.arguments(batch), range(first + start, first + start + len(batch.captions))
            noise, *others = (
                torch.stack([chain_noise(self.origin.seed, chain, part.latent, one) for chain in chains])
                for one in range(self.origin.first_window + 1)
            )
            # Scales of the same chains are drawn alike.
            further = [self.ends(other, arguments, chains[0], num_windows=1)[0] for other in others]
            ends, scales = self.ends(noise, arguments, chains[0], data=batch.data)
            yield ends, scales, torch.cat(further, dim=1) if further else None, batch.data

    @torch.no_grad()
    def ends(
        self, noise: Tensor, arguments: Any, first: int, num_windows: int | None = None, data: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Where the teacher carries noise [B, ...] by each window's clean edge, [B, K, ...]; and drawn scales [B].

        Args:
            arguments: See `ChainSolver`. first: Number of the first chain, from which scales are drawn in mode range.
            num_windows: Of the noisiest alone; None: all K.
            data: Clean latents [B, ...]: each window starts at them with the noise, as a store keeps them.
        """
        network, guidance = self.run.teacher.network, self.run.recipe.guidance
        noise = noise.to(next(network.parameters()).device)
        generator = step_generator(self.origin.seed, 0, first, device=noise.device, purpose="scales")
        batch, segments = self.batch(noise, arguments, generator), self.run.segments

        def solve(x: Tensor, times: Tensor, k: int) -> Tensor:
            return segments.edge(batch, guidance, x, times, k)

        times = path_times(self.run.solver_grids[:num_windows], noise, batch.windows.ratio)
        if data is None:
            states = teacher_path(batch.noise, times, solve)[1:]
        else:
            batch = replace(batch, data=data.to(DTYPES[self.origin.dtype]).to(noise))
            states = torch.stack([solve(diffused(batch, window[0]), window, k) for k, window in enumerate(times)])
        return states.transpose(0, 1).cpu(), batch.scale.cpu() if guidance.mode == "range" else None


def planned(buckets: Callable[[int], Iterable[Part]], origin: Origin, rows: int) -> Iterator[Part]:
    """What a store holds, shard after shard without end.

    A longer store begins as a shorter one does.

    Args:
        buckets: Number of a pass over the data set -> its rows, in the buckets that the host draws.
        rows: Of the data set, for the error.

    Raises:
        ValueError: a pass in which no row falls into a bucket.
    """
    for one_pass in count():
        generator, parts = step_generator(origin.seed, 0, one_pass, purpose="plan"), []
        for bucket in buckets(one_pass):
            states = len(origin.windows) - 1 + origin.first_window + (origin.starts == "diffused")
            size = DTYPES[origin.dtype].itemsize * states * prod(bucket.latent)
            each = min(MOST_ROWS, max(1, SHARD_BYTES // size))
            order = torch.randperm(len(bucket.captions), generator=generator).tolist()
            parts += [bucket.of(order[start : start + each]) for start in range(0, len(order), each)]
        if not parts:
            raise ValueError(
                f"none of the {rows} rows of the data set falls into a bucket of bucket_config; add a bucket that they fit, or "
                "name larger sizes"
            )
        yield from (parts[place] for place in torch.randperm(len(parts), generator=generator).tolist())


def open_store(recipe: Recipe, host: Mapping[str, Any]) -> ChainStore | None:
    """The store that a recipe names; None where there is none.

    Args:
        host: The host's settings that a teacher's path depends on, plain.

    Raises:
        ValueError: the store is damaged, or does not fit; see store.ChainStore and store.Origin.check.
    """
    folder = recipe.teacher.stored
    if folder is None:
        return None
    if "perflow_consistency" in json.dumps(recipe.objective):
        raise ValueError(
            "teacher.stored has a teacher's states at window edges alone, and the objective perflow_consistency needs those "
            "between; use another objective, or a teacher that solves"
        )
    store = ChainStore(folder)
    store.origin.check(recipe, dict(host), folder)
    return store


def check_recipe(recipe: Recipe) -> None:
    """Raises ValueError for a recipe whose chains no store has."""
    if recipe.teacher.stored is not None:
        raise ValueError("the config trains from a store (teacher.stored); name the config of a training whose teacher solves")
    if recipe.curriculum is not None and recipe.curriculum.teacher == "previous":
        raise ValueError('curriculum.teacher="previous" teaches by students, whose paths no store has; use teacher="original"')
    if recipe.draws.starts == "diffused" and (recipe.curriculum is not None or recipe.draws.grids):
        raise ValueError(
            'draws.starts="diffused" starts each window at data anew, so a store has the windows of `windows` alone; use no '
            'curriculum and no draws.grids, or starts="student"'
        )
    Origin.of(recipe, {}, "", "", 1, "float16", 0)  # before a text encoder of 19 GB is loaded


def check_batch(chains: Tensor | None, latent: Sequence[int], store: ChainStore | None, where: str) -> None:
    """Raises ValueError where a batch and a run's store do not go together.

    Args:
        chains: Of the batch, [B]; None: it names none. latent: C, T, H, W of its latents.
        where: How a config names a store.
    """
    if (chains is None) != (store is None):
        raise ValueError(
            'teacher.stored trains from stored chains, and this batch names none; use dataset=dict(type="perflow_stored")'
            if store is not None
            else f"the dataset type perflow_stored names stored chains; say which: {where}"
        )
    if store is not None and store.latent_shape(chains) != tuple(latent):
        raise ValueError(
            f"the batch has latents {list(latent)}, and its stored chains {list(store.latent_shape(chains))}; train with "
            "the dataset type perflow_stored and its latents"
        )


def training_store(data_path: str | None, named: str | None, where: str) -> ChainStore:
    """The store of a training set.

    Args:
        data_path: Given to the training set, or None. named: Given to the recipe, or None. where: How a config names a store.

    Raises:
        ValueError: no store, or two.
    """
    folder = named if data_path is None else data_path
    if folder is None or (named is not None and Path(folder).resolve() != Path(named).resolve()):
        raise ValueError(
            f"perflow_stored takes the store that {where} names, got {named!r} there and data_path={data_path!r}; name one "
            "store"
        )
    return ChainStore(folder)


class Passes:
    """What a training set has in each pass over a store that may grow: row r is the store's r-th chain.

    A pass follows from the number of chains at its beginning, which all processes share.

    chains: Of each row, see ChainStore.chains.

    Raises:
        ValueError: the store has no first shard.
    """

    def __init__(self, store: ChainStore) -> None:
        self.store = store
        self.chains = store.chains[: self._agreed()]
        if not self.chains:
            raise ValueError(f"the store {str(store.folder)!r} has no first shard; run the command again that wrote the store")
        if len(store) > len(store.chains):
            logger.warning(
                "PeRFlow trains from the first %d chains of %s: a shard is missing there, and the %d after it wait; run the "
                "command again that wrote the store",
                len(store.chains), store.folder, len(store) - len(store.chains),
            )  # fmt: skip

    def next(self, alone: bool = False) -> bool:
        """Take the chains that a writer has added since the pass before; are there any?

        Args:
            alone: The other processes do not call, and follow this one's rows.

        Raises:
            ValueError: see ChainStore.look_again.
        """
        self.store.look_again()
        count, before = len(self.store.chains) if alone else self._agreed(), len(self.chains)
        self.chains = self.store.chains[:count]
        if count > before:
            logger.info("PeRFlow trains from %d chains of %s now, %d more", count, self.store.folder, count - before)
        return count > before

    def _agreed(self) -> int:
        # A process may see less than another: it looked earlier, or its file system is late.
        return min(gathered(len(self.store.chains)))


def pass_begins() -> bool:
    """Is our caller asked by a sampler that begins a pass? All processes do that, and nobody else asks together."""
    frame = sys._getframe(2)
    while frame is not None and isinstance(frame.f_locals.get("self"), Sampler):
        if frame.f_code.co_name == "__iter__":
            return True
        frame = frame.f_back
    return False


def whole_buckets(bucket_config: Mapping[str, Any], store: ChainStore) -> dict[str, Any]:
    """The buckets of a config with all of their chains: shares were drawn when the store was written.

    Raises:
        ValueError: they are not those that the store was written for.
    """
    here = {name: sorted(map(int, sizes)) for name, sizes in bucket_config.items()}
    there = {name: sorted(map(int, sizes)) for name, sizes in store.plan["buckets"].items()}
    if here != there:
        raise ValueError(
            f"the store {str(store.folder)!r} was written for the buckets {there} (resolution: frames), and this config's "
            f"bucket_config has {here}; use the one that the store was written with"
        )
    return {name: {frames: (1.0, one[1]) for frames, one in sizes.items()} for name, sizes in bucket_config.items()}


def chain_at(store: ChainStore, index: str) -> tuple[int, dict[str, float]]:
    """The chain of a sample "row-frames-height-width" of the host's buckets, and what its teacher was told.

    Raises:
        ValueError: no such chain, or a bucket of another size than the chain's.
    """
    row, *size = (int(value) for value in index.split("-"))
    if row >= len(store.chains):  # a worker that loads data looked before the pass began
        store.look_again()
    if row >= len(store.chains):
        raise ValueError(
            f"another process sees {row + 1} chains of the store {str(store.folder)!r}, and this one does not; keep the store "
            "where all processes see the same files"
        )
    chain, told = store.chains[row]
    if size != [told["num_frames"], told["height"], told["width"]]:
        raise ValueError(
            f"a chain of {told['num_frames']} frames of {told['height']} x {told['width']} came into a bucket of "
            f"{size[0]} frames of {size[1]} x {size[2]}; use the bucket_config that the store was written with"
        )
    return chain, told
