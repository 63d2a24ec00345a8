"""The chains of a store of Open-Sora 2.0, and the teacher that solves them as a training would."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts import chains
from opensora_perflow.hosts.chains import ChainSolver, Part
from opensora_perflow.hosts.v2.host import OpenSora2
from opensora_perflow.hosts.v2.keys import Keys
from opensora_perflow.hosts.v2.stored_chains import path_settings
from opensora_perflow.hosts.v2.training_call import TrainingCall, completed
from opensora_perflow.training.players import Batch
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.run import TrainingRun
from opensora_perflow.training.store import Origin
from opensora_perflow.training.teacher import first_teacher

Prepare = Callable[[Sequence[str], Sequence[int]], Mapping[str, Tensor]]
"""(captions, C T H W) -> what train.py tells the network of these samples, besides state and time."""


def chain_solver(recipe: Recipe, keys: Keys, network: nn.Module, prepare: Prepare, seed: int) -> ChainSolver:
    """What solves the chains of a recipe.

    Args:
        network: With the weights of the recipe's teacher where the recipe names none. It is not copied then.
        seed: Of the noise.

    Raises:
        ValueError: see store.Origin.of and teacher.first_teacher.
    """
    host = OpenSora2(network.eval().requires_grad_(False) if recipe.teacher.from_pretrained is None else None)
    teacher = first_teacher(recipe.teacher, network, host)
    run = TrainingRun(recipe, host, teacher, recipe.stages())
    dtype = next(network.parameters()).dtype

    def batch(noise: Tensor, told: Mapping[str, Tensor], generator: torch.Generator) -> Batch:
        channels, patch = noise.shape[1], network.patch_size
        img = noise.new_zeros(*told["img_ids"].shape[:2], channels * patch**2, dtype=dtype)
        call = TrainingCall.of(network, completed(network, {**told, "img": img, "timesteps": img.new_ones(len(img))}))
        return replace(call.batch(run, keys, generator), noise=noise)

    settings = path_settings(keys, network.patch_size)
    origin = Origin.of(recipe, settings, teacher.fingerprint, teacher.source, teacher.stage, "float16", seed)
    return ChainSolver(run, origin, lambda part: prepare(part.captions, part.latent), batch)


def planned(
    dataset: Any,
    captions: Sequence[str],
    bucket_config: Mapping[str, Any],
    latent: Callable[[tuple[int, int, int]], tuple[int, ...]],
    origin: Origin,
) -> Iterator[Part]:
    """See chains.planned; each row is in the bucket that the host's sampler draws in an epoch.

    Args:
        captions: Of the data set's rows. latent: Frames, height, width -> C, T, H, W of their latents.
    """
    from opensora.datasets.bucket import Bucket

    bucket = Bucket(bucket_config)
    sizes = list(zip(*(dataset.data[name].tolist() for name in ("num_frames", "height", "width", "fps"))))

    def buckets(one_pass: int) -> Iterator[Part]:
        found = defaultdict(list)
        for row, one in enumerate(sizes):
            seed = origin.seed + one_pass + row * bucket.num_bucket
            place = bucket.get_bucket_id(*one, seed=seed, fps_max=dataset.fps_max)
            if place is not None:
                found[place].append(row)
        for place, rows in found.items():
            pixels = bucket.get_thw(place)
            told = dict(zip(("num_frames", "height", "width"), pixels))
            yield Part([captions[row] for row in rows], told, latent(pixels), bucket.get_batch_size(place), rows)

    return chains.planned(buckets, origin, len(sizes))
