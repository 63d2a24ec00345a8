"""One process of test_a_sequence_parallel_group_draws_the_same; started by torchrun.

    torchrun --nproc_per_node 2 _sequence_worker.py ROOT OUT

The groups are those that Open-Sora itself makes for zero2-seq (two processes, one group) and for zero2 (two data-parallel
ranks). The network is not split: that takes alltoall, which needs nccl and CUDA and is not run here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_perflow import portable
from opensora_perflow.hosts.v1.scheduler import PeRFlow
from opensora_perflow.worlds.model import TinySTDiT
from opensora_perflow.worlds.text import TinyTextEncoder

SIZES = {"height": 64.0, "width": 64.0, "num_frames": 17.0, "fps": 24.0}
DRAWS = {"starts": "diffused", "per_solve": 2, "edge_mass": 0.5}


def set_groups(plugin_name: str, sp_size: int) -> None:
    """What train.py does with cfg.plugin and cfg.sp_size."""
    from opensora.acceleration import parallel_states

    if plugin_name == "zero2":
        parallel_states.set_sequence_parallel_group(None)
        parallel_states.set_data_parallel_group(dist.group.WORLD)
        return
    from opensora.acceleration.plugin import ZeroSeqParallelPlugin

    plugin = ZeroSeqParallelPlugin(sp_size=sp_size, stage=2, precision="bf16", initial_scale=2**16)
    KEPT.append(plugin)  # its destructor ends the groups
    parallel_states.set_sequence_parallel_group(plugin.sp_group)
    parallel_states.set_data_parallel_group(plugin.dp_group)


KEPT: list[object] = []


def drawn(steps: int = 3) -> list[Tensor]:
    """Starts (latents and noise), times and dropped texts of some steps; the latents that come in are this rank's own."""
    torch.manual_seed(0)
    network, encoder = TinySTDiT(hidden_size=32, depth=1, num_heads=2, class_dropout_prob=0.5).train(), TinyTextEncoder()
    encoder.y_embedder = network.y_embedder
    scheduler, seen = PeRFlow(windows=3, draws=DRAWS, teacher={"steps_per_window": 1}), []
    objective = scheduler.objective

    def record(student, segment, t, weights):
        seen.extend([segment.x_start, segment.t_start, t])
        return objective(student, segment, t, weights)

    scheduler.objective = record
    network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["y"]), with_kwargs=True)
    args = {**encoder.encode(["a red circle"] * 4), **{key: torch.full((4,), value) for key, value in SIZES.items()}}
    torch.manual_seed(dist.get_rank())
    for _ in range(steps):
        scheduler.training_losses(network, torch.randn(4, 4, 5, 4, 4), args)
    return seen


def main() -> None:
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(root))
    portable.activate()
    dist.init_process_group(backend="nccl")  # gloo answers
    results = {}
    for plugin_name, sp_size in (("zero2-seq", 2), ("zero2", 1)):
        set_groups(plugin_name, sp_size)
        results[plugin_name] = drawn()
    torch.save(results, out / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
