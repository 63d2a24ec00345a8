"""Which processes work on the same samples, and which share of the data is this one's.

The host keeps its groups in opensora.acceleration.parallel_states (every 1.x tag). That module is looked up, not imported: the
host's script has imported it, or there is no host.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def data_parallel_rank() -> int:
    """Rank among the processes that work on different samples; 0 without torch.distributed.

    Processes of one sequence-parallel group work on the same samples and have the same rank here. With plain torch.distributed
    every process has samples of its own.
    """
    if not _distributed():
        return 0
    host = _host_groups()
    return dist.get_rank(None if host is None else host.get_data_parallel_group())  # None: all processes


def shared(*values: Any) -> Sequence[Any]:
    """The values of the first process of this sequence-parallel group, in all its processes; else the values as they are.

    The host splits one network over the group, so that all its processes have to call it with the same. Each of them draws and
    encodes the batch anew, and the host relies on equal seeds and equal results. Reference frames of v1.3 come from
    random.Random(rank), which differ (scripts/train.py:252).

    Args:
        values: Tensors, all on one device in a process, and what else can be pickled.
    """
    host = _host_groups() if _distributed() else None
    group = None if host is None else host.get_sequence_parallel_group()
    if group is None or dist.get_world_size(group) == 1:
        return values
    first = dist.get_global_rank(group, 0)
    described = [_Described.of(value) for value in values]
    device = next((value.device for value in values if isinstance(value, Tensor)), "cpu")
    dist.broadcast_object_list(described, first, group)
    return [
        told.receive(value if dist.get_rank() == first else None, device, first, group)
        if isinstance(told, _Described)
        else told
        for told, value in zip(described, values, strict=True)
    ]


def mean_over_ranks(value: float, device: torch.device | str = "cpu") -> float:
    """The mean of a number over all processes, the same on each; the number itself in a plain process.

    Every process has to call it. `device`: where the process group's backend wants its tensors (cuda for nccl).
    """
    if not _distributed():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def average_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Put the mean over all processes in the place of tensors, in one message; nothing in a plain process.

    Every process has to call it with tensors of the same shapes and one dtype.
    """
    if not _distributed() or not tensors:
        return
    whole = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(whole)
    parts = (whole / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts):
        tensor.copy_(part.view_as(tensor))


def gathered(value: Any) -> list[Any]:
    """What every process gives, in the order of their ranks; [value] in a plain process. Every process has to call it."""
    if not _distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@dataclass(frozen=True)
class _Described:
    """A tensor that is on its way."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any) -> Any:
        return cls(value.shape, value.dtype) if isinstance(value, Tensor) else value

    def receive(self, value: Tensor | None, device: torch.device | str, first: int, group: dist.ProcessGroup) -> Tensor:
        """`value` where it is given, which sends it; elsewhere what was sent."""
        # As bytes: gloo has no bfloat16 in every torch.
        empty = torch.empty(self.shape, dtype=self.dtype, device=device)
        tensor = empty if value is None else value.detach().contiguous()
        dist.broadcast(tensor.view(-1).view(torch.uint8), first, group)
        return tensor


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _host_groups() -> ModuleType | None:
    return sys.modules.get("opensora.acceleration.parallel_states")
