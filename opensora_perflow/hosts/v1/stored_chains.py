"""Stored chains in a call of Open-Sora 1.x: which chain a sample is, and whether the store fits the training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opensora_perflow.hosts.v1.keys import Keys
from opensora_perflow.method.process import Linear, Process
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.store import ChainStore

if TYPE_CHECKING:
    from opensora_perflow.hosts.v1.training_call import TrainingCall

CHAIN = "perflow_chain"
"""Name in a batch of each sample's chain, [B, 4]: the number's bytes, lowest first. train.py casts what a batch holds to
bfloat16, which counts no further than 256."""


def chain_bytes(chain: int) -> Tensor:
    """A chain's number as `CHAIN` holds it, [4]."""
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
    """The store that a recipe names; None where there is none.

    Raises:
        ValueError: the store is damaged, or does not fit; see store.ChainStore and store.Origin.check.
    """
    folder = recipe.teacher.stored
    if folder is None:
        return None
    if not isinstance(process, (Linear, type(None))):
        raise ValueError('teacher.stored holds paths of rectified flows, path="linear", and this network has path="ddpm"')
    if "perflow_consistency" in json.dumps(recipe.objective):
        raise ValueError(
            "teacher.stored has a teacher's states at window edges alone, and the objective perflow_consistency needs those "
            "between; use another objective, or a teacher that solves"
        )
    store = ChainStore(folder)
    store.origin.check(recipe, path_settings(keys), folder)
    return store


def check_call(call: TrainingCall, store: ChainStore | None) -> None:
    """Raises ValueError where a batch and the run's store do not go together."""
    if (call.chains is None) != (store is None):
        raise ValueError(
            'teacher.stored trains from stored chains, and this batch names none; use dataset=dict(type="perflow_stored")'
            if store is not None
            else 'the dataset type perflow_stored names stored chains; say which: scheduler=dict(teacher=dict(stored="DIR"))'
        )
    if store is not None and (call.mask is not None or call.references):
        raise ValueError(
            "frames that stand still (mask_ratios, mask_types) move in stored chains; train without those, or without "
            "teacher.stored"
        )
    here = tuple(call.x_start.shape[1:])
    if store is not None and store.latent_shape(call.chains) != here:
        raise ValueError(
            f"the batch has latents {list(here)}, and its stored chains {list(store.latent_shape(call.chains))}; train with "
            "the dataset type perflow_stored and load_video_features=True"
        )
