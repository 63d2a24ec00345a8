"""One process of test_zero_on_a_cpu_is_adamw: trains a small network with ColossalAI's ZeRO and again in plain torch.

Started by torchrun. Every rank computes all ranks' gradients for the reference, so that no communication is needed there,
and rounds where ZeRO rounds: each rank's share to bfloat16, their sum to bfloat16. The weights must agree to the last bit.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_perflow import portable

STEPS = 5


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 7, generator=generator).bfloat16()


def loss_of(network: nn.Module, x: Tensor) -> Tensor:
    return network(x).float().pow(2).mean()


def agrees(stage: int, overlap_allgather: bool) -> bool:
    """Whether ZeRO with HybridAdam ends with the weights of AdamW on averaged gradients."""
    from colossalai.booster import Booster
    from colossalai.booster.plugin import LowLevelZeroPlugin
    from colossalai.nn.optimizer import HybridAdam

    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    # Odd sizes: no parameter but one divides by two, so that padding is part of the test.
    network = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 3)).bfloat16()
    reference = copy.deepcopy(network)
    masters = [parameter.detach().float() for parameter in reference.parameters()]
    reference_optimizer = torch.optim.AdamW(masters, lr=1e-2, weight_decay=0)

    plugin = LowLevelZeroPlugin(stage=stage, precision="bf16", overlap_allgather=overlap_allgather, reduce_bucket_size_in_m=20)
    model, optimizer, *_ = Booster(plugin=plugin).boost(network, HybridAdam(network.parameters(), lr=1e-2))
    for step in range(STEPS):
        optimizer.backward(loss_of(model, batch(step, rank)))
        optimizer.step()
        optimizer.zero_grad()

        totals = [torch.zeros_like(master) for master in masters]
        for other in range(world_size):
            reference.zero_grad()
            loss_of(reference, batch(step, other)).backward()
            for total, parameter in zip(totals, reference.parameters(), strict=True):
                total += (parameter.grad / world_size).float()
        for master, total in zip(masters, totals, strict=True):
            master.grad = total.bfloat16().float()
        reference_optimizer.step()
        for master, parameter in zip(masters, reference.parameters(), strict=True):
            parameter.data.copy_(master)
    model._force_wait_all_gather()
    pairs = zip(model.module.parameters(), reference.parameters(), strict=True)
    return all(torch.equal(ours.data, theirs.data) for ours, theirs in pairs)


def main() -> None:
    portable.activate()
    dist.init_process_group(backend="nccl")
    for stage in (1, 2):
        for overlap_allgather in (False, True):
            assert agrees(stage, overlap_allgather), f"ZeRO-{stage}, overlap_allgather={overlap_allgather} differs"
    print(f"rank {dist.get_rank()} agrees")


if __name__ == "__main__":
    main()
