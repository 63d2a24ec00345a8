"""`opensora_perflow.run`, with what NCCL can and gloo cannot: all-to-all, gathering unequal parts, inference tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist

from opensora_perflow.run import main


def all_gather(parts: list[torch.Tensor], x: torch.Tensor, group: object = None) -> None:
    found: list[torch.Tensor] = [x] * len(parts)
    dist.all_gather_object(found, x.detach(), group=group)
    for part, value in zip(parts, found, strict=True):
        part.copy_(value)


def all_to_all(outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: object = None) -> None:
    found: list[list[torch.Tensor]] = [[]] * len(inputs)
    dist.all_gather_object(found, [x.detach() for x in inputs], group=group)
    for output, sent in zip(outputs, found, strict=True):
        output.copy_(sent[dist.get_rank(group)])


def all_to_all_single(output: torch.Tensor, x: torch.Tensor, group: object = None) -> None:
    count = dist.get_world_size(group)
    all_to_all(list(output.chunk(count)), list(x.chunk(count)), group)


dist.all_gather, dist.all_to_all, dist.all_to_all_single = all_gather, all_to_all, all_to_all_single
torch.inference_mode = torch.no_grad
main()
