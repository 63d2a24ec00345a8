"""The stores of ColossalAI 0.3's ZeRO optimizer, where a newer one is installed.

0.3.7, which v1.2.0 pins, cannot run without CUDA; 0.4 and later keep the same things under other names:
  _param_store.working_to_master_param: update_ema of Open-Sora 1.0 to 1.2 reads fp32 master weights there
    (utils/train_utils.py v1.2.0:62); now `get_working_to_master_map()`, which v1.3 asks.
  _grad_store, _bucket_store: scripts/misc/search_bs.py clears them after an out-of-memory error (v1.1.0:357-365,
    v1.2.0:135-143); now one of each for every process group. A script of v1.1 or v1.2 has one group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from opensora_perflow.portable.imports import announce, package_file, source_mentions, when_imported

NAME = "zero_stores"


@dataclass(frozen=True)
class ParamStore:
    """id of a working parameter -> this rank's fp32 master copy of it."""

    working_to_master_param: dict[int, Tensor]


def _param_store(optimizer: Any) -> ParamStore:
    return ParamStore(optimizer.get_working_to_master_map())


def _only(stores: Mapping[Any, Any]) -> Any:
    (store,) = stores.values()  # several process groups (mixture of experts) would need several: fail, do not pick one
    return store


def _add_properties(module: ModuleType) -> None:
    optimizer = module.LowLevelZeroOptimizer
    optimizer._param_store = property(_param_store)
    optimizer._grad_store = property(lambda self: _only(self.pg_to_grad_store))
    optimizer._bucket_store = property(lambda self: _only(self.pg_to_bucket_store))


def install() -> bool:
    host_asks = source_mentions("opensora", "utils/train_utils.py", "_param_store")
    optimizer_file = "zero/low_level/low_level_optim.py"
    if not host_asks or package_file("colossalai", optimizer_file) is None:
        return False
    if source_mentions("colossalai", optimizer_file, "_param_store"):
        return False
    when_imported("colossalai.zero.low_level.low_level_optim", _add_properties)
    announce(NAME, "the ZeRO optimizer answers to _param_store, _grad_store, _bucket_store, because ColossalAI renamed them")
    return True
