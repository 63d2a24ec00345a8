"""The three small worlds of the benchmarks, behind one interface: a guided teacher, students of it, data and prompts.

mixture  16 dimensions, 24 modes, closed-form teacher (opensora_perflow/worlds/mixture.py), MLP students of any width
video    moving shapes, the demo's tiny text-to-video teacher (opensora_perflow/worlds/), students that start as its copy
stdit3   the same weights in Open-Sora's own STDiT3 class, hidden size 96; needs an Open-Sora checkout
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opensora_perflow.method.metrics import temporal_difference_energy
from opensora_perflow.tools.demo import build_network
from opensora_perflow.worlds.clips import FPS, contents, frames_to_tensor, make_clip
from opensora_perflow.worlds.codec import TinyVAE
from opensora_perflow.worlds.mixture import DIM, NUM_CLASSES, ClassText, Mixture, MixtureNetwork
from opensora_perflow.worlds.text import TinyTextEncoder


class World(ABC):
    """Everything that a comparison of samplers needs to know of a model and its data."""

    name: str
    guidance: float
    """Scale of the teacher's guidance."""
    latent_shape: tuple[int, ...]
    prompts: list[str]
    teacher: nn.Module
    text: Any
    device: torch.device

    @abstractmethod
    def student(self, width: int | None) -> nn.Module:
        """A new student that starts as the teacher, in train mode, drawn from torch's global generator."""

    @abstractmethod
    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Clean latents and model_args of one training step."""

    def sizes(self, count: int) -> dict[str, Tensor]:
        """What Open-Sora's scripts send along with the prompts."""
        return {}

    @abstractmethod
    def describe(self, x: Tensor, endpoints: Tensor) -> dict[str, float]:
        """This world's own column of the table, and what else it can say."""

    own_column: str
    """Key of `describe`."""


class MixtureWorld(World):
    name, guidance, own_column = "mixture", 2.0, "same_mode"
    latent_shape = (DIM, 1, 1, 1)

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.mixture = Mixture.standard()
        self.prompts = [f"class {k}" for k in range(NUM_CLASSES)]
        self.text = ClassText(device)
        self.teacher = MixtureNetwork(self.mixture, width=1).eval().to(device)  # untrained, the MLP adds nothing at any width

    def student(self, width: int | None) -> nn.Module:
        return MixtureNetwork(self.mixture, width or 256).train().to(self.device)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        class_idx = torch.randint(NUM_CLASSES, (size,), generator=generator)
        data = self.mixture.draw(class_idx, generator)
        return data.to(self.device), self.text.of(class_idx)

    def describe(self, x: Tensor, endpoints: Tensor) -> dict[str, float]:
        nearest, also = (torch.cdist(latents.cpu().flatten(1), self.mixture.means).argmin(dim=1) for latents in (x, endpoints))
        return {"same_mode": (nearest == also).double().mean().item()}


class VideoWorld(World):
    """Args: open_sora: checkout whose STDiT3 class takes the place of the tiny copy of it; num_clips: size of the data set."""

    guidance, own_column = 3.0, "motion"

    def __init__(self, device: str = "cpu", open_sora: Path | None = None, num_clips: int = 512) -> None:
        self.name = "video" if open_sora is None else "stdit3"
        self.device, self._open_sora = torch.device(device), open_sora
        self.teacher = build_network(open_sora).eval().to(device)
        self.text = TinyTextEncoder(device=device)
        self.text.y_embedder = self.teacher.y_embedder
        self.prompts = sorted({content.caption for content in contents()})
        rng, vae = np.random.default_rng(0), TinyVAE().eval()
        frames, captions = zip(*(make_clip(rng) for _ in range(num_clips)))
        self._num_frames, self._height, self._width = frames[0].shape[:3]
        with torch.no_grad():
            parts = [vae.encode(frames_to_tensor(np.stack(frames[i : i + 32]))) for i in range(0, num_clips, 32)]
        self._latents = torch.cat(parts)
        self._encoded = self.text.encode(list(captions))
        self.latent_shape = tuple(self._latents.shape[1:])

    def student(self, width: int | None) -> nn.Module:
        if width is not None:
            raise ValueError(f"students of world {self.name!r} start as their teacher, of its width; got width={width}")
        return build_network(self._open_sora).train().to(self.device)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(self._latents), (size,), generator=generator)
        text = {key: value[index.to(self.device)] for key, value in self._encoded.items()}
        return self._latents[index].to(self.device), {**text, **self.sizes(size)}

    def sizes(self, count: int) -> dict[str, Tensor]:
        values = {"num_frames": self._num_frames, "height": self._height, "width": self._width, "fps": FPS}
        values["ar"] = self._height / self._width
        return {key: torch.full((count,), float(value), device=self.device) for key, value in values.items()}

    def describe(self, x: Tensor, endpoints: Tensor) -> dict[str, float]:
        energy, error = temporal_difference_energy(endpoints), temporal_difference_energy(x - endpoints)
        return {"motion": temporal_difference_energy(x) / energy, "motion_error": error / energy}
