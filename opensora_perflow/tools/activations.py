"""What one evaluation of a network keeps for its backward, and what it computes: counted while its own code runs on meta."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from opensora_perflow.hosts import meta


@dataclass(frozen=True)
class Cost:
    """Of one evaluation. Bytes: `kept` without checkpointing, `checkpointed` with; `block` is what the largest block needs
    while it is computed anew. flops: Of the forward, a multiplication and its addition counting as two."""

    kept: int
    checkpointed: int
    block: int
    flops: int


class Storages:
    """Memory that tensors lie in, each piece counted once."""

    def __init__(self, *known: Iterable[Tensor]) -> None:
        self._found: dict[int, Tensor] = {}
        for tensors in known:
            for tensor in tensors:
                self._found[self._key(tensor)] = tensor
        self.bytes = 0

    def add(self, tensor: Tensor) -> None:
        key = self._key(tensor)
        if key not in self._found:
            self._found[key] = tensor  # alive, so that no other gets its place
            self.bytes += tensor.untyped_storage().nbytes()

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata


def cost(network: nn.Module, evaluate: Callable[[], Tensor]) -> Cost:
    """What an evaluation with a gradient costs.

    Args:
        network: Whose weights are no activations.
        evaluate: Calls the network, on meta or not.
    """
    own = meta.tensors_of(network)
    all_of_it, outside, blocks = Storages(own), Storages(own), [0]
    inside: list[Storages] = []

    def keep(tensor: Tensor) -> Tensor:
        all_of_it.add(tensor)
        (inside[-1] if inside else outside).add(tensor)
        return tensor

    def run(module: nn.Module, *inputs: Any, **named: Any) -> Any:
        if not inside:
            for value in (*inputs, *named.values()):
                if isinstance(value, Tensor):
                    outside.add(value)
        inside.append(Storages(own, outside._found.values()))
        try:
            return module(*inputs, **named)
        finally:
            blocks.append(inside.pop().bytes)

    before, counter = meta.attention_flops, FlopCounterMode(display=False)
    with meta.checkpointed(run), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        output = evaluate()
    del output
    flops = counter.get_total_flops() + meta.attention_flops - before
    return Cost(all_of_it.bytes, outside.bytes, max(blocks), flops)


def flops(work: Callable[[], object]) -> int:
    """What some work without a gradient computes."""
    before, counter = meta.attention_flops, FlopCounterMode(display=False)
    with counter:
        work()
    return counter.get_total_flops() + meta.attention_flops - before
