"""Stored chains in a call of Open-Sora 1.x: which chain a sample is, and whether the store fits the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opensora_perflow.hosts import chains
from opensora_perflow.hosts.chains import CHAIN
from opensora_perflow.hosts.v1.keys import Keys
from opensora_perflow.method.process import Linear, Process
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.store import ChainStore

if TYPE_CHECKING:
    from opensora_perflow.hosts.v1.training_call import TrainingCall

WHERE = 'scheduler=dict(teacher=dict(stored="DIR"))'
"""How a config names a store."""


def chain_bytes(chain: int) -> Tensor:
    """A chain's number as a batch of 1.x holds it, [4]: its bytes, lowest first.

    train.py casts what a batch holds to bfloat16, which counts no further than 256.
    """
    return torch.tensor(list(chain.to_bytes(4, "little")))


def take_chains(model_args: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """What the network is told, and the chains [B] of the samples, int64 on the CPU; None without."""
    told = dict(model_args)
    found = told.pop(CHAIN, None)
    if found is None:
        return told, None
    return told, (found.cpu().long() * 256 ** torch.arange(4)).sum(dim=1)


def path_settings(keys: Keys) -> dict[str, Any]:
    """The host's settings that a teacher's path depends on, plain."""
    return {
        "transform": keys.transform_state(),
        "num_timesteps": keys.num_timesteps,
        "use_flaw_fix": keys.use_flaw_fix,
    }


def open_store(recipe: Recipe, keys: Keys, process: Process | None = None) -> ChainStore | None:
    """See chains.open_store. Raises ValueError also for a network of a diffusion."""
    if recipe.teacher.stored is not None and not isinstance(process, (Linear, type(None))):
        raise ValueError('teacher.stored holds paths of rectified flows, path="linear", and this network has path="ddpm"')
    return chains.open_store(recipe, path_settings(keys))


def check_call(call: TrainingCall, store: ChainStore | None) -> None:
    """Raises ValueError where a batch and the run's store do not go together."""
    if store is not None and (call.mask is not None or call.references):
        raise ValueError(
            "frames that stand still (mask_ratios, mask_types) move in stored chains; train without those, or without "
            "teacher.stored"
        )
    chains.check_batch(call.chains, call.x_start.shape[1:], store, WHERE)
