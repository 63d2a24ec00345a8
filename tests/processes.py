"""Two processes of gloo, as a test wants them."""

import os
import sys

import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(worker, folder, *given):
    """Calls `worker(rank, *given)` in ranks 0 and 1; an exception of either is raised here."""
    mp.spawn(_as_rank, (worker, folder / "rendezvous", given), nprocs=2)


def _as_rank(rank, worker, rendezvous, given):
    """One rank. The process ends at once when all is done: torch's threads can abort an interpreter
    that is being taken down."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    worker(rank, *given)
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
