"""The chains of a store of Open-Sora 1.x, and the teacher that solves them as a training would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from opensora_perflow.hosts import chains
from opensora_perflow.hosts.chains import ChainSolver, Part
from opensora_perflow.hosts.v1.encoded_text import EncodedText
from opensora_perflow.hosts.v1.network import Interface
from opensora_perflow.hosts.v1.scheduler import PeRFlow
from opensora_perflow.hosts.v1.stored_chains import path_settings
from opensora_perflow.hosts.v1.training_call import TrainingCall, Translation
from opensora_perflow.training.players import Batch
from opensora_perflow.training.run import TrainingRun
from opensora_perflow.training.store import Origin
from opensora_perflow.training.teacher import first_teacher

IMAGE_FPS, VIDEO_FPS = 120, 24
"""What the host tells networks of images, and of videos where a data set knows nothing else."""


def chain_solver(scheduler: PeRFlow, model: nn.Module, text: EncodedText, seed: int, dtype: torch.dtype) -> ChainSolver:
    """What solves the chains of a scheduler's recipe; their arguments are train.py's model_args.

    Args:
        model: The network, with the weights of the recipe's teacher where the recipe names none.
        text: Encodes captions.
        seed: Of the noise.
        dtype: Of what networks are told, as train.py casts it.

    Raises:
        ValueError: see store.Origin.of and teacher.first_teacher; a network of a diffusion.
    """
    recipe, host = scheduler.recipe, scheduler.host
    process, prediction = scheduler.process_of(model)
    if scheduler.state().path != "linear":
        raise ValueError('stores hold paths of rectified flows, path="linear", and this network has path="ddpm"')
    teacher = first_teacher(recipe.teacher, model, host)
    run = TrainingRun(recipe, host, teacher, scheduler.curriculum)
    translation = Translation(run, scheduler.keys, process, prediction, scheduler.negative_text())
    network, interface = teacher.network, Interface.of(teacher.network)

    def arguments(part: Part) -> dict[str, Any]:
        device, count = next(network.parameters()).device, len(part.captions)
        sizes = {name: torch.tensor(value).expand(count).to(device, dtype) for name, value in part.told.items()}
        return {**text.encode(part.captions), **sizes}

    def batch(noise: Tensor, model_args: Mapping[str, Any], generator: torch.Generator) -> Batch:
        call = TrainingCall(network, interface, torch.zeros_like(noise), model_args, None, False, noise, *[None] * 7)
        return translation.batch(call, scheduler.warped(model_args, noise), generator)[0]

    origin = Origin.of(
        recipe, path_settings(scheduler.keys), teacher.fingerprint, teacher.source, teacher.stage, "float16", seed
    )
    return ChainSolver(run, origin, arguments, batch)


def planned(dataset: Dataset, bucket_config: Mapping[str, Any], vae: Any, origin: Origin) -> Iterator[Part]:
    """See chains.planned; each row is in the bucket that the host draws in a pass."""
    from opensora.datasets.sampler import VariableVideoBatchSampler

    sampler = VariableVideoBatchSampler(dataset, bucket_config, num_replicas=1, rank=0, shuffle=False, seed=origin.seed)

    def buckets(one_pass: int) -> Iterator[Part]:
        sampler.set_epoch(one_pass)
        for bucket, rows in sampler.group_by_bucket().items():
            num_frames, height, width = sampler.bucket.get_thw(bucket)
            latent = (vae.out_channels, *vae.get_latent_size((num_frames, height, width)))
            fps = IMAGE_FPS if num_frames == 1 else getattr(dataset, "fps", VIDEO_FPS)
            told = {"num_frames": num_frames, "height": height, "width": width, "ar": height / width, "fps": fps}
            captions = [str(dataset.data["text"].iloc[row]) for row in rows]
            yield Part(captions, told, latent, sampler.bucket.get_batch_size(bucket), rows)

    return chains.planned(buckets, origin, len(dataset))
