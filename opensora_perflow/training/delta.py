"""What a student learned, apart from the weights that it began with: a difference that gives the student back to the last bit.

    student = base + delta,  fine-tune + scale * delta: the fine-tune's own look, and few steps.

A float32 difference is rounded where weights change their size much. What the rounding took is a float32 number too (the error
of a floating-point sum), and is kept beside, for those few weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.training.adapters import DOWN, UP

CHANGE, REST = "delta.", "rest."
"""Before a weight's name: its change, float32, in its shape; and [2, n] float64, what rounding took of n of its elements:
flat positions, and values."""
KEPT = "kept."
"""Before the name of a tensor that the student has and the base's file has not, as the network computes it."""
UNRELATED = 0.5
"""Of its own norm, how far a student or a fine-tune may be from its base. Weights trained from another start are 1.4 away."""


@dataclass(frozen=True)
class Distance:
    """How far a fine-tune lies from its base, beside the delta, over the weights that the delta changes.

    base, delta, drift: Norms of the base's weights, of the delta, and of fine-tune - base.
    cosine: Of the angle between drift and delta: 1, the fine-tune went the student's way; -1, it went back; 0 without drift.
    """

    base: float
    delta: float
    drift: float
    cosine: float

    @property
    def related(self) -> bool:
        """Is this a fine-tune of that base at all?"""
        return self.drift <= UNRELATED * self.base


def difference(student: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Student - base: tensors under CHANGE and REST for each weight that changed.

    Args:
        student, base: The same names and shapes, see `mismatches`; in float32 or less.
    """
    found = {}
    for name, value in student.items():
        after, before = value.float(), base[name].float()
        change = after - before
        if not change.any():
            continue
        found[CHANGE + name] = change
        # What float32 took from the difference (Knuth's two-sum), exactly.
        part = change - after
        rest = (after - (change - part)) - (before + part)
        at = rest.flatten().nonzero()[:, 0]
        if len(at):
            found[REST + name] = torch.stack([at.double(), rest.flatten()[at].double()])
    return found


def added(weights: Mapping[str, Tensor], delta: Mapping[str, Tensor], scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights + scale * delta in a dtype, summed in float64: at scale 1, of the base, the student itself.

    Args:
        weights: With the names and shapes of `delta`; what the delta does not change is brought to the dtype alone.
        delta: As `difference` makes it.
    """
    result = {}
    for name, value in weights.items():
        change, rest = delta.get(CHANGE + name), delta.get(REST + name)
        if change is None:
            result[name] = value.to(dtype)
            continue
        total = value.double().add_(change.double(), alpha=scale)
        if rest is not None:  # last: where base and change cancel, their sum is exact
            total.view(-1).index_add_(0, rest[0].long(), rest[1], alpha=scale)
        result[name] = total.to(torch.float32).to(dtype)
    return result


def changed(delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changes by the names of their weights."""
    return {name.removeprefix(CHANGE): value for name, value in delta.items() if name.startswith(CHANGE)}


def mismatches(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], names: tuple[str, str], whole: bool = True) -> str:
    """Which names and shapes two sets of weights do not share, in words; empty where all is well.

    `names`: What the two are. `whole`: Names that `theirs` has alone count too.
    """
    shapes = [{name: list(value.shape) for name, value in state.items()} for state in (ours, theirs)]
    told = [f"{name} is missing in {names[1]}" for name in shapes[0] if name not in shapes[1]]
    told += [f"{name} is missing in {names[0]}" for name in shapes[1] if whole and name not in shapes[0]]
    told += [
        f"{name} is {shape} in {names[0]} and {shapes[1][name]} in {names[1]}"
        for name, shape in shapes[0].items()
        if shapes[1].get(name, shape) != shape
    ]
    return "; ".join(told[:4]) + (f"; and {len(told) - 4} more" if len(told) > 4 else "")


def compare(tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> Distance:
    """How a fine-tune of a base lies to a delta. `changes`: see `changed`; their names are compared, in float64."""
    sums = torch.zeros(4, dtype=torch.float64)
    for name, change in changes.items():
        start, change = base[name].double().flatten(), change.double().flatten()
        drift = tuned[name].double().flatten() - start
        sums += torch.stack([start @ start, change @ change, drift @ drift, drift @ change])
    norms = sums[:3].sqrt().tolist()
    product = norms[1] * norms[2]
    return Distance(*norms, cosine=sums[3].item() / product if product else 0.0)


def low_rank(changes: Mapping[str, Tensor], layers: Mapping[str, Sequence[int]], rank: int) -> tuple[dict[str, Tensor], float]:
    """Adapters of a rank that come nearest to a delta, and what they miss, as a share of the delta's norm.

    Args:
        changes: See `changed`. What is no weight of a linear layer no adapter holds, and is missed whole.
        layers: Name -> (out, in) of all linear layers; adapters of those that did not change are zero.
        rank: >= 1; smaller layers get zeros up to the rank.
    """
    adapters, lost = {}, 0.0
    for layer, (rows, columns) in layers.items():
        down, up = torch.zeros(rank, columns), torch.zeros(rows, rank)
        change = changes.get(f"{layer}.weight")
        if change is not None:
            left, sizes, right = torch.linalg.svd(change.float(), full_matrices=False)
            most = min(rank, len(sizes))
            root = sizes[:most].sqrt()
            down[:most], up[:, :most] = root[:, None] * right[:most], left[:, :most] * root
            lost += sizes[most:].double().square().sum().item()
        adapters[f"{layer}{DOWN}"], adapters[f"{layer}{UP}"] = down, up
    squares = {name: change.double().square().sum().item() for name, change in changes.items()}
    lost += sum(square for name, square in squares.items() if name.removesuffix(".weight") not in layers)
    return adapters, (lost / sum(squares.values())) ** 0.5
