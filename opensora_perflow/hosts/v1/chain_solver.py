"""The chains of a store: which they are, and their solution by the teacher that a training of Open-Sora 1.x would have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from opensora_perflow.hosts.v1.encoded_text import EncodedText
from opensora_perflow.hosts.v1.scheduler import PeRFlow
from opensora_perflow.hosts.v1.stored_chains import path_settings
from opensora_perflow.hosts.v1.training_call import TrainingCall, Translation
from opensora_perflow.training.randomness import TrainingRandomness, step_generator
from opensora_perflow.training.run import TrainingRun
from opensora_perflow.training.segments import path_times, teacher_path
from opensora_perflow.training.store import DTYPES, SHARD_BYTES, Origin, chain_noise
from opensora_perflow.training.teacher import first_teacher

MOST_ROWS = 64
"""Chains of a shard."""
IMAGE_FPS, VIDEO_FPS = 120, 24
"""What the host tells networks of images, and of videos where a data set knows nothing else."""


@dataclass(frozen=True)
class Part:
    """Chains of one shard: captions, what else the teacher is told of each, their latents' shape, and how many at once."""

    captions: Sequence[str]
    told: Mapping[str, float]
    latent: tuple[int, ...]
    batch_size: int


class ChainSolver:
    """Solves chains by a recipe's teacher.

    Args:
        scheduler: Whose recipe and keys count.
        model: The network, with the weights of the recipe's teacher where the recipe names none.
        text: Encodes captions.
        seed: Of the noise.
        dtype: Of what networks are told, as train.py casts it.

    Raises:
        ValueError: see store.Origin.of and teacher.first_teacher; a network of a diffusion.
    """

    def __init__(self, scheduler: PeRFlow, model: nn.Module, text: EncodedText, seed: int, dtype: torch.dtype) -> None:
        recipe, host = scheduler.recipe, scheduler.host
        self.scheduler, self.text, self.seed, self.dtype = scheduler, text, seed, dtype
        process, prediction = scheduler.process_of(model)
        if scheduler.state().path != "linear":
            raise ValueError('stores hold paths of rectified flows, path="linear", and this network has path="ddpm"')
        teacher = first_teacher(recipe.teacher, model, host)
        self.run = TrainingRun(recipe, host, teacher, scheduler.curriculum)
        self.run.randomness = TrainingRandomness(seed, 0)
        self.translation = Translation(self.run, scheduler.keys, process, prediction, scheduler.negative_text())
        self.origin = Origin.of(
            recipe, path_settings(scheduler.keys), teacher.fingerprint, teacher.source, teacher.stage, "float16", seed
        )

    def solve(self, part: Part, first: int) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """The part's chains first, first + 1, ..., batch by batch.

        Yields:
            Ends [n, K, C, T, H, W]; scales [n], where they are drawn; further states at the first clean edge
            [n, M, C, T, H, W], where the origin has any.
        """
        for start in range(0, len(part.captions), part.batch_size):
            captions = part.captions[start : start + part.batch_size]
            args = {**self.text.encode(captions), **self._told(part, len(captions))}
            chains = range(first + start, first + start + len(captions))
            noise, *others = (
                torch.stack([chain_noise(self.seed, chain, part.latent, one) for chain in chains])
                for one in range(self.origin.further + 1)
            )
            # Scales of the same chains are drawn alike.
            further = [self.ends(other, args, chains[0], num_windows=1)[0] for other in others]
            yield *self.ends(noise, args, chains[0]), torch.cat(further, dim=1) if further else None

    @torch.no_grad()
    def ends(
        self, noise: Tensor, model_args: Mapping[str, Any], first: int, num_windows: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Where the teacher carries noise [B, ...] by each window's clean edge, [B, K, ...]; and drawn scales [B].

        Args:
            model_args: As train.py's. first: Number of the first chain, from which scales are drawn in mode range.
            num_windows: Of the noisiest alone; None: all K.
        """
        network, guidance = self.run.teacher.network, self.run.recipe.guidance
        noise = noise.to(next(network.parameters()).device)
        call = TrainingCall(
            network, network, torch.zeros_like(noise), model_args, None, False, noise, None, None, None, None, None, None, None
        )
        windows = self.scheduler.warped(model_args, noise)
        generator = step_generator(self.seed, 0, first, device=noise.device, purpose="scales")
        batch, _ = self.translation.batch(call, windows, generator)
        segments = self.run.segments

        def solve(x: Tensor, times: Tensor, k: int) -> Tensor:
            return segments.edge(batch, guidance, x, times, k)

        states = teacher_path(batch.noise, path_times(self.run.solver_grids[:num_windows], noise, windows.ratio), solve)
        return states[1:].transpose(0, 1).cpu(), batch.scale.cpu() if guidance.mode == "range" else None

    def _told(self, part: Part, count: int) -> dict[str, Tensor]:
        device = next(self.run.teacher.network.parameters()).device
        return {name: torch.tensor([value] * count).to(device, self.dtype) for name, value in part.told.items()}


def planned(dataset: Dataset, bucket_config: Mapping[str, Any], vae: Any, origin: Origin) -> Iterator[Part]:
    """What a store holds, shard after shard without end: passes over the data set, each row in the bucket that the host draws.

    A longer store begins as a shorter one does.

    Raises:
        ValueError: a pass in which no row falls into a bucket.
    """
    from opensora.datasets.sampler import VariableVideoBatchSampler

    sampler = VariableVideoBatchSampler(dataset, bucket_config, num_replicas=1, rank=0, shuffle=False, seed=origin.seed)
    for one_pass in count():
        sampler.set_epoch(one_pass)
        generator, parts = step_generator(origin.seed, 0, one_pass, purpose="plan"), []
        for bucket, rows in sampler.group_by_bucket().items():
            num_frames, height, width = sampler.bucket.get_thw(bucket)
            latent = (vae.out_channels, *vae.get_latent_size((num_frames, height, width)))
            size = DTYPES[origin.dtype].itemsize * (len(origin.windows) - 1 + origin.further) * prod(latent)
            each = min(MOST_ROWS, max(1, SHARD_BYTES // size))
            fps = IMAGE_FPS if num_frames == 1 else getattr(dataset, "fps", VIDEO_FPS)
            told = {"num_frames": num_frames, "height": height, "width": width, "ar": height / width, "fps": fps}
            rows = [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
            captions = [str(dataset.data["text"].iloc[row]) for row in rows]
            parts += [
                Part(captions[start : start + each], told, latent, sampler.bucket.get_batch_size(bucket))
                for start in range(0, len(rows), each)
            ]
        if not parts:
            raise ValueError(
                f"none of the {len(dataset)} rows of the data set falls into a bucket of bucket_config; add a bucket that they "
                "fit, or give perflow_captions larger sizes"
            )
        yield from (parts[place] for place in torch.randperm(len(parts), generator=generator).tolist())
