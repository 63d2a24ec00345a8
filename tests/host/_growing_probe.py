"""Imported by configs of tests whose store grows: its second index comes back when the second pass begins.

The first process asks the training set for its table at each sample, too, which no other process does.
"""

from pathlib import Path

import torch.distributed as dist
from opensora import registry

from opensora_perflow.hosts.chains import Passes
from opensora_perflow.hosts.parallel import gathered

HIDDEN, INDEX = "hidden.json", "index-00001.json"
look, calls = Passes.next, []


def growing(self: Passes, alone: bool = False) -> bool:
    calls.append(alone)
    # 2.0's first call asks how long a pass is, and is kept for the first pass. 1.x asks the set itself for that.
    if len(calls) == (2 if alone else 1):
        if not dist.is_initialized() or dist.get_rank() == 0:
            (Path(self.store.folder) / HIDDEN).rename(Path(self.store.folder) / INDEX)
        if not alone:
            gathered(None)
    return look(self, alone)


Passes.next = growing
if hasattr(registry, "SCHEDULERS"):
    StoredChains = registry.DATASETS.get("perflow_stored")
    getitem = StoredChains.getitem

    def asking(self: StoredChains, index: str) -> dict:
        if dist.get_rank() == 0:
            assert len(self.data) == len(self)
        return getitem(self, index)

    StoredChains.getitem = asking
