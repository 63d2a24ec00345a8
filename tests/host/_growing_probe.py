"""Imported by configs of tests whose store grows: its second index comes back when the second pass begins."""

from pathlib import Path

import torch.distributed as dist

from opensora_perflow.hosts.chains import Passes
from opensora_perflow.hosts.parallel import gathered

HIDDEN, INDEX = "hidden.json", "index-00001.json"
look, calls = Passes.next, []


def growing(self: Passes, alone: bool = False) -> bool:
    calls.append(alone)
    if len(calls) == 2:  # the first asks how long a pass is, and is kept for the first pass
        if not dist.is_initialized() or dist.get_rank() == 0:
            (Path(self.store.folder) / HIDDEN).rename(Path(self.store.folder) / INDEX)
        if not alone:
            gathered(None)
    return look(self, alone)


Passes.next = growing
