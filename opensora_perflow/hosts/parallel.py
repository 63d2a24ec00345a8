"""Which share of the data this process works on."""

from __future__ import annotations

import sys

import torch.distributed as dist


def data_parallel_rank() -> int:
    """Rank among the processes that work on different samples; 0 without torch.distributed.

    Processes of one sequence-parallel group work on the same samples and have the same rank here. The host keeps its groups in
    opensora.acceleration.parallel_states (every 1.x tag); with plain torch.distributed every process has samples of its own.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    host = sys.modules.get("opensora.acceleration.parallel_states")  # the host's script has imported it, or there is no host
    return dist.get_rank(None if host is None else host.get_data_parallel_group())  # None: all processes
