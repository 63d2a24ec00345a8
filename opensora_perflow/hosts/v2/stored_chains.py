"""Stored chains in a training of Open-Sora 2.0: which chain a sample is, and what of the host's settings a path depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from opensora_perflow.hosts.chains import CHAIN
from opensora_perflow.hosts.script import main_variable
from opensora_perflow.hosts.v2.keys import Keys

WHERE = 'model=dict(perflow=dict(teacher=dict(stored="DIR")))'
"""How a config names a store."""


def named_chains(arguments: Mapping[str, Any]) -> Tensor | None:
    """The chain of each sample, int64 [B] on the CPU; None where nothing names any.

    Args:
        arguments: Of the network's call. train.py passes no chains: they are in the batch that it keeps in a variable.
    """
    batch = main_variable("batch")
    found = arguments.get(CHAIN, batch.get(CHAIN) if isinstance(batch, Mapping) else None)
    return None if found is None else found.cpu().long()


def path_settings(keys: Keys, patch_size: int) -> dict[str, Any]:
    """The host's settings that a teacher's path depends on, plain. The warp of time follows from sizes and patches."""
    return {"transform": {"formula": "v2.0", "flow_shift": keys.flow_shift}, "patch_size": patch_size}
