"""Decisions that all processes of a run have to take alike."""

from __future__ import annotations

import torch
import torch.distributed as dist


def mean_over_ranks(value: float, device: torch.device | str = "cpu") -> float:
    """The mean of a number over all processes, the same on each; the number itself in a plain process.

    Every process has to call it. `device`: where the process group's backend wants its tensors (cuda for nccl).
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()
