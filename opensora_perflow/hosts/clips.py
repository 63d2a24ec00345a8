"""Clips of a data set for stores over data, read and encoded as train.py does it."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from opensora_perflow.hosts.chains import Part
from opensora_perflow.training.shards import text_digest

logger = logging.getLogger("opensora_perflow")

IDENTITY = ("path", "num_frames", "height", "width", "fps")
"""Columns of a table of videos that tell its clips apart."""


def clips_digest(dataset: Any) -> str:
    """Identity of a data set's clips, as its table names them; nothing is read from them.

    Raises:
        ValueError: a data set of captions alone.
    """
    if "path" not in dataset.data.columns or type(dataset).__module__.startswith("opensora_perflow."):
        raise ValueError(
            'draws.starts="diffused" starts windows at videos, and this data set has captions alone; name a config and a '
            'table of videos, or use draws=dict(starts="student")'
        )
    columns = [dataset.data[name].tolist() for name in IDENTITY if name in dataset.data.columns]
    return text_digest(map(str, zip(*columns)))


@dataclass(frozen=True)
class Clips:
    """Gives parts of a store their data.

    dataset: The host's, of videos. vae: The host's, on `device` and in `dtype`. seed: Of crops and of the VAE's noise.
    digest: See `clips_digest`. own: What the teacher is told of each clip for itself.
    """

    dataset: Any
    vae: Any
    device: str
    dtype: torch.dtype
    seed: int
    digest: str
    own: Sequence[str] = ()

    @torch.no_grad()
    def of(self, part: Part, first: int) -> Part:
        """The part's chains first, first + 1, ... with their clips' latents; without those whose clips cannot be read."""
        samples = [self._read(row, part, first + place) for place, row in enumerate(part.rows)]
        part = part.of([place for place, sample in enumerate(samples) if sample is not None])
        samples = [sample for sample in samples if sample is not None]
        own = {name: [float(sample[name]) for sample in samples] for name in self.own}
        data = torch.stack([sample["video"] for sample in samples]) if samples else None
        return replace(part, told={**part.told, **own}, data=data)

    def _read(self, row: int, part: Part, chain: int) -> dict[str, Any] | None:
        seed = (self.seed + chain) % 2**32
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        size = (part.told[name] for name in ("num_frames", "height", "width"))
        try:
            sample = self.dataset.getitem("-".join(map(str, (row, *size))))
        except Exception as error:  # whatever readers of videos raise
            logger.warning("%s is left out: %s", self.dataset.data.iloc[row]["path"], error)
            return None
        if sample is None:  # 2.0 has printed why
            return None
        video = sample["video"].to(self.device, self.dtype)[None]
        return {**sample, "video": self.vae.encode(video)[0].float().cpu()}
