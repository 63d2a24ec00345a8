"""Chains on disk: the guided teacher's way from noise through all windows, solved once, trained from many times.

A chain is one sample's states at the edges 1 = e_0 > e_1 > ... > e_K = 0. The noise at e_0 is not kept: it follows from the
store's seed and the chain's number. The K states at the clean edges are, in a shard as `ends` [n, K, C, T, H, W]. A chain may
have further solutions of the first window, for the same caption from noise of their own: `further` [n, M, C, T, H, W].

A store over data (starts="diffused") has a clip's latents beside them, `data` [n, C, T, H, W]. Each window then starts at data
with the chain's noise, whatever the window before ends at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.training.randomness import step_generator
from opensora_perflow.training.recipe import Guidance, Recipe
from opensora_perflow.training.shards import Shards, ShardWriter, differences, sha256

KIND = "stored chains"
REMEDY = "write a store with `opensora-perflow store CONFIG --out DIR`"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 2**26
"""Of a shard: what a killed writer loses, at most."""
SEEN = 4
"""Values of a chain's noise that are kept, to tell a torch that draws other numbers."""


@dataclass(frozen=True)
class Origin:
    """What chains were made by and for; the header of a store.

    windows: Edges, untransformed. solver, steps: The teacher's ODE steps in each window. guidance: The keys of
    recipe.Guidance, a negative prompt as its file's SHA-256. teacher, teacher_source, stage: See state.StudentState.
    host: What of the host's settings a path depends on: the warp, sizes of time ranges. dtype: Of the ends on disk.
    seed: Of the noise. first_window: Solutions of the first window that each chain has besides its own. starts: "student":
    windows start where the one before ends; "diffused": at data with noise.
    """

    windows: Sequence[float]
    solver: str
    steps: int
    guidance: dict[str, Any]
    teacher: str
    teacher_source: str
    stage: int
    host: dict[str, Any]
    dtype: str
    seed: int
    first_window: int = 0
    starts: str = "student"

    @classmethod
    def of(cls, recipe: Recipe, host: dict[str, Any], teacher: str, source: str, stage: int, dtype: str, seed: int) -> Origin:
        """Of chains that a recipe's teacher is to solve.

        Raises:
            ValueError: a recipe whose teacher's path is not one from noise.
        """
        if recipe.guidance.mode == "sync":
            raise ValueError(
                'a store holds guided paths, and guidance mode "sync" drops texts and guides the student alone; use '
                'guidance=dict(mode="fixed", scale=7.0), or mode="range"'
            )
        return cls(
            list(recipe.windows.edges), recipe.teacher.solver, recipe.teacher_steps, guidance_of(recipe.guidance), teacher,
            source, stage, host, dtype, seed, starts=recipe.draws.starts,
        )  # fmt: skip

    def check(self, recipe: Recipe, host: dict[str, Any], folder: str | os.PathLike) -> None:
        """Raises ValueError where a training would not fit the chains."""
        if recipe.draws.starts != self.starts:
            raise ValueError(
                f"the store {str(folder)!r} was solved with draws.starts={self.starts!r}, and this training has "
                f"{recipe.draws.starts!r}; set draws=dict(starts={self.starts!r}), or write another store"
            )
        trained = [recipe.windows, *map(TimeWindows.uniform, recipe.draws.grids)]
        if self.starts == "diffused" and (recipe.curriculum or any(list(one.edges) != list(self.windows) for one in trained)):
            raise ValueError(
                f"the store {str(folder)!r} starts each of its windows {list(self.windows)} at data anew, so no others can be "
                "put together from them; train those windows, without a curriculum and draws.grids"
            )
        if any(edge not in self.windows for windows in trained for edge in windows.edges):
            raise ValueError(
                f"the store {str(folder)!r} has chains with the window edges {list(self.windows)}, and this training's windows "
                f"{' and '.join(str(list(windows.edges)) for windows in trained)} have others; set windows and draws.grids to "
                "edges of the store, or write another store"
            )
        for name, here in {"guidance": guidance_of(recipe.guidance), "host": host}.items():
            there = getattr(self, name)
            different = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key)]
            if different:
                listed = "; ".join(f"{key} is {there.get(key)} there and {here.get(key)} here" for key in different)
                what = "guidance" if name == "guidance" else "settings of the scheduler"
                raise ValueError(
                    f"the store {str(folder)!r} was solved with other {what} than this training has: {listed}; set them alike"
                )


def guidance_of(guidance: Guidance) -> dict[str, Any]:
    """The keys of a guidance, plain; a negative prompt as its file's SHA-256."""
    found = asdict(guidance)
    if guidance.negative is not None:
        found["negative"] = sha256(guidance.negative)
    return json.loads(json.dumps(found))


class ChainWriter:
    """Adds chains to a store; arguments and errors as ShardWriter."""

    def __init__(self, folder: str | os.PathLike, origin: Origin, rank: int = 0, **plan: Any) -> None:
        remedy = "write to another folder, or with the settings of this one"
        self.origin = origin
        # What is not used leaves the header as it was in versions that did not know it.
        header = {field.name: value for field, value in zip(fields(origin), asdict(origin).values()) if value != field.default}
        self.shards = ShardWriter(folder, KIND, {**header, **plan}, rank, remedy)

    def write(
        self,
        number: int,
        first: int,
        ends: Tensor,
        captions: Sequence[str],
        told: Mapping[str, Any],
        scales: Tensor | None = None,
        further: Tensor | None = None,
        data: Tensor | None = None,
    ) -> None:
        """Write the chains first, first + 1, ...

        Args:
            number: Of the shard.
            ends: States at the clean edges, [n, K, C, T, H, W].
            captions: What each was told.
            told: What else the teacher was told: the video's sizes in pixels and frames, its rate. A value of all chains, or
                a list of one a chain.
            scales: Guidance [n], where each chain has its own.
            further: Further states at the first clean edge, [n, M, C, T, H, W], from `chain_noise` with further = 1..M.
            data: Clean latents at which windows start with noise, [n, C, T, H, W].

        Raises:
            ValueError: states that are not finite, or too large for the store's dtype.
        """
        stored = {name: one for name, one in (("ends", ends), ("further", further), ("data", data)) if one is not None}
        tensors = {name: states.to(DTYPES[self.origin.dtype]) for name, states in stored.items()}
        for name, states in tensors.items():
            if not bool(states.isfinite().all()):
                raise ValueError(
                    f"the teacher's states reach {stored[name].abs().max().item():.4g}, which is not finite or too large for "
                    f"{self.origin.dtype}; check the teacher's weights and guidance"
                )
        chains = range(first, first + len(ends))
        seen = torch.stack([chain_noise(self.origin.seed, chain, ends.shape[2:]).flatten()[:SEEN] for chain in chains])
        tensors |= {"noise": seen} | ({} if scales is None else {"scales": scales.double()})
        self.shards.write(
            number,
            tensors,
            {"captions": json.dumps(list(captions))},
            len(ends),
            first=first,
            told=dict(told),
            latent=list(ends.shape[2:]),
        )


def chain_noise(seed: int, chain: int, shape: Sequence[int], further: int = 0) -> Tensor:
    """The state of a chain at t = 1, float32, on the CPU; `further` >= 1: of that further solution of its first window."""
    purpose = f"chain, further {further}" if further else "chain"
    return torch.randn(tuple(shape), generator=step_generator(seed, 0, chain, purpose=purpose))


def told_of(told: Mapping[str, Any], rows: int | Sequence[int]) -> dict[str, Any]:
    """What the teacher was told of one chain, or of some, of those that `ChainWriter.write` was told of."""
    one = isinstance(rows, int)
    return {
        name: value if not isinstance(value, list) else value[rows] if one else [value[row] for row in rows]
        for name, value in told.items()
    }


class ChainStore:
    """A store to train from.

    folder: Where it is. origin: What its chains are. plan: What else its writer says of the whole.
    chains: Number of each chain, and what its teacher was told besides the caption, up to the first shard that is missing:
        several writers leave gaps for a while.

    Raises:
        ValueError: see Shards.open.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._shards = Shards.open(folder, KIND, REMEDY)
        names = {field.name for field in fields(Origin)}
        self.origin = Origin(**{name: value for name, value in self._shards.header.items() if name in names})
        self.plan = {name: value for name, value in self._shards.header.items() if name not in names}
        self._seen: set[int] = set()
        self._find_places()

    def look_again(self) -> None:
        """See the chains, too, that a writer has added since.

        Raises:
            ValueError: see Shards.open; or another store has taken this one's place.
        """
        found = Shards.open(self.folder, KIND, REMEDY)
        if found.header != self._shards.header:
            raise ValueError(
                f"the store {str(self.folder)!r} is another than when this training began: "
                f"{differences(self._shards.header, found.header)}; write another store to another folder"
            )
        self._shards = found
        self._find_places()

    def _find_places(self) -> None:
        whole = {number: shard for number, shard in self._shards.shards.items() if shard.rows}
        by_first = sorted((shard.about["first"], number) for number, shard in whole.items())
        self._numbers = [number for _, number in by_first]
        self._firsts = torch.tensor([first for first, _ in by_first])
        self._ends = self._firsts + torch.tensor([whole[number].rows for number in self._numbers])
        self._shapes = list({tuple(shard.about["latent"]) for shard in whole.values()})
        self.chains: list[tuple[int, dict[str, float]]] = []
        for number in takewhile(self._shards.shards.__contains__, count()):
            shard = self._shards.shards[number]
            self.chains += [(shard.about["first"] + row, told_of(shard.about["told"], row)) for row in range(shard.rows)]

    def __len__(self) -> int:
        return sum(shard.rows for shard in self._shards.shards.values())

    @property
    def over_data(self) -> bool:
        """Does each window start at data, so that no path from noise is known?"""
        return self.origin.starts == "diffused"

    def caption(self, chain: int) -> str:
        [(number, _, rows)] = self._found(torch.tensor([chain]))
        return json.loads(self._shards.metadata(number)["captions"])[int(rows)]

    def latent_shape(self, chains: Tensor) -> tuple[int, ...]:
        """C, T, H, W of chains [B].

        Raises:
            ValueError: they have different ones.
        """
        if len(self._shapes) == 1 and not self._places(chains)[1].any():
            return self._shapes[0]
        shapes = {tuple(self._shards.shards[number].about["latent"]) for number, _, _ in self._found(chains)}
        if len(shapes) > 1:
            raise ValueError(f"one batch has chains with latents of different shapes, {sorted(shapes)}; use the host's buckets")
        return shapes.pop()

    def states(self, chains: Tensor, places: Tensor, further: Tensor | None = None) -> Tensor:
        """States of B chains [B], each at an edge 0..K of its own of the store's windows, [B]: [B, C, T, H, W], float32.

        Args:
            further: Which solution each is of, [B]: 0 the chain's own, 1..M a further one, at edges 0 and 1. None: its own.

        Raises:
            ValueError: no such chain, or noise that this torch draws otherwise than the torch that wrote the store.
        """
        states = torch.empty(len(chains), *self.latent_shape(chains))
        for number, samples, rows in self._found(chains):  # a file is asked once, not once a sample
            at, which = places[samples], torch.zeros_like(rows) if further is None else further[samples]
            own = which == 0
            first, later, more = at == 0, (at > 0) & own, (at > 0) & ~own
            states[samples[later]] = self._shards.tensor(number, "ends")[rows[later], at[later] - 1].float()
            if more.any():
                states[samples[more]] = self._shards.tensor(number, "further")[rows[more], which[more] - 1].float()
            starting = zip(chains[samples[first]].tolist(), which[first].tolist())
            noise = [chain_noise(self.origin.seed, chain, states.shape[1:], one) for chain, one in starting]
            states[samples[first]] = torch.stack(noise) if noise else states[:0]
            seen = first & own
            if number not in self._seen and seen.any():
                self._check_noise(self._shards.tensor(number, "noise")[rows[seen]], states[samples[seen]])
                self._seen.add(number)
        return states

    def _check_noise(self, kept: Tensor, drawn: Tensor) -> None:
        # 1e-5: kinds of CPUs round the logarithm and the cosine in their last bits.
        if not torch.allclose(kept, drawn.flatten(1)[:, :SEEN], rtol=0, atol=1e-5):
            raise ValueError(
                f"torch {torch.__version__} draws other noise for the store {str(self.folder)!r} than the torch that wrote "
                "the store; train with that version, or write the store anew"
            )

    def data(self, chains: Tensor) -> Tensor:
        """Clean latents of B chains over data, [B, C, T, H, W], float32."""
        data = torch.empty(len(chains), *self.latent_shape(chains))
        for number, samples, rows in self._found(chains):
            data[samples] = self._shards.tensor(number, "data")[rows].float()
        return data

    def scales(self, chains: Tensor) -> Tensor:
        """Guidance by which each of B chains was solved, where it was drawn, [B], float64."""
        scales = torch.empty(len(chains), dtype=torch.float64)
        for number, samples, rows in self._found(chains):
            scales[samples] = self._shards.tensor(number, "scales")[rows]
        return scales

    def nearest(self, u: Tensor) -> Tensor:
        """Which of the store's edges each untransformed time [B] is, [B], on the CPU."""
        edges = torch.tensor(self.origin.windows, dtype=torch.float64)
        return (edges[:, None] - u.cpu()[None]).abs().argmin(dim=0)

    def _found(self, chains: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each shard that holds some of the chains [B]: its number, which of the B are there, and their rows."""
        place, lost = self._places(chains)
        if lost.any():  # perhaps another process looked later than this one
            self.look_again()
            place, lost = self._places(chains)
        if lost.any():
            raise ValueError(
                f"the store {str(self.folder)!r} holds no chain {int(chains[lost][0])}; train with the dataset type "
                "perflow_stored"
            )
        for one in place.unique().tolist():
            samples = (place == one).nonzero().flatten()
            yield self._numbers[one], samples, chains[samples] - self._firsts[one]

    def _places(self, chains: Tensor) -> tuple[Tensor, Tensor]:
        """Of chains [B]: where each one's shard is in the order of first chains, and whether it is in none."""
        place = torch.bucketize(chains, self._firsts, right=True) - 1
        return place, (place < 0) | (chains >= self._ends[place])
