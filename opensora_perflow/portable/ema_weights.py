"""`optimizer._param_store.working_to_master_param` of ColossalAI 0.3, where a newer one is installed.

update_ema of Open-Sora 1.0 to 1.2 (utils/train_utils.py v1.2.0:62) reads fp32 master weights there. 0.3.7 cannot run
without CUDA, and 0.4 and later answer the same question with `get_working_to_master_map()`, which v1.3 asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from opensora_perflow.portable.imports import announce, package_file, source_mentions, when_imported

NAME = "ema_weights"


@dataclass(frozen=True)
class ParamStore:
    """id of a working parameter -> this rank's fp32 master copy of it."""

    working_to_master_param: dict[int, Tensor]


def _param_store(optimizer: Any) -> ParamStore:
    return ParamStore(optimizer.get_working_to_master_map())


def _add_property(module: ModuleType) -> None:
    module.LowLevelZeroOptimizer._param_store = property(_param_store)


def install() -> bool:
    host_asks = source_mentions("opensora", "utils/train_utils.py", "_param_store")
    optimizer_file = "zero/low_level/low_level_optim.py"
    if not host_asks or package_file("colossalai", optimizer_file) is None:
        return False
    if source_mentions("colossalai", optimizer_file, "_param_store"):
        return False
    when_imported("colossalai.zero.low_level.low_level_optim", _add_property)
    announce(NAME, "optimizer._param_store works again for the host's EMA, because the installed ColossalAI renamed it")
    return True
