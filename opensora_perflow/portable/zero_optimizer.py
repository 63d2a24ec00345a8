"""ColossalAI's LowLevelZeroOptimizer on a CPU with gloo: ZeRO-1 and ZeRO-2 as the host uses them.

Three things stop it there (0.4.6, zero/low_level/low_level_optim.py): the constructor's check refuses any accelerator
but cuda and npu (line 235); overlapping communication records tensors on a CUDA stream (line 324); ZeRO-2 calls
reduce_scatter (line 355), which gloo does not have in torch 2.2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_perflow.portable.imports import ModuleView, announce, has_cuda, is_installed, when_imported

NAME = "zero_optimizer"


def gloo_has_reduce_scatter() -> bool:
    """Whether this torch's gloo implements reduce_scatter; asked of a group of one, which involves no other process."""
    if not dist.is_gloo_available():
        return False
    try:
        group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=30))
        group.reduce_scatter([torch.ones(1)], [[torch.ones(1)]]).wait()
    except RuntimeError:
        return False
    return True


def reduce_scatter(output: Tensor, input_list: Sequence[Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
    """Sum over ranks of `input_list[own rank]` into `output`, by an all_reduce of everything and a slice.

    Every rank passes one tensor per rank, all shaped like `output`. Half precision is summed in float32, rounded once.
    Sends world-size times what reduce_scatter would: right for a test machine, not for a cluster.
    """
    flat = torch.stack([tensor.reshape(-1) for tensor in input_list])
    if flat.dtype in (torch.bfloat16, torch.float16):
        flat = flat.float()
    dist.all_reduce(flat, op=op, group=group)
    output.copy_(flat[dist.get_rank(group)].reshape(output.shape))


def _without_overlap(init: Callable[..., None]) -> Callable[..., None]:
    # There is no second queue to overlap with on a CPU; without the option the same sums are made after the backward.
    @functools.wraps(init)
    def call(self: Any, *args: Any, **options: Any) -> None:
        options["overlap_communication"] = False
        init(self, *args, **options)

    return call


def _as_if_on_cuda(check: Callable[[Any], None], module: ModuleType) -> Callable[[Any], None]:
    # The check has a second half, on the dtype of the parameters, that is as useful here as anywhere.
    @functools.wraps(check)
    def call(self: Any) -> None:
        get_accelerator = module.get_accelerator
        module.get_accelerator = lambda: _NamedCuda
        try:
            check(self)
        finally:
            module.get_accelerator = get_accelerator

    return call


class _NamedCuda:
    name = "cuda"


def _adapt(module: ModuleType) -> None:
    if module.get_accelerator().name != "cpu":
        return
    optimizer = module.LowLevelZeroOptimizer
    optimizer.__init__ = _without_overlap(optimizer.__init__)
    optimizer._sanity_checks = _as_if_on_cuda(optimizer._sanity_checks, module)
    if not gloo_has_reduce_scatter():
        module.dist = ModuleView(module.dist, reduce_scatter=reduce_scatter)


def install() -> bool:
    if has_cuda() or not is_installed("colossalai"):
        return False
    when_imported("colossalai.zero.low_level.low_level_optim", _adapt)
    announce(NAME, "ColossalAI's ZeRO accepts a CPU and sums gradients with gloo, because this machine has no CUDA")
    return True
