"""What benchmarks/long_video.py samples: scenes whose conditional flow is known, and shapes that bounce between walls."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scenes import SceneNetwork, Scenes
from torch import Tensor, nn
from tqdm import tqdm
from train_teacher import save_weights, train_teacher

from opensora_perflow.atomic import replacing
from opensora_perflow.worlds.clips import COLORS, FPS, HEIGHT, SHAPES, WIDTH, draw_shape, frames_to_tensor, tensor_to_frames
from opensora_perflow.worlds.codec import TinyVAE
from opensora_perflow.worlds.mixture import NUM_CLASSES, ClassText
from opensora_perflow.worlds.model import WEIGHTS, TinySTDiT
from opensora_perflow.worlds.text import TinyTextEncoder

SHARED = 2
"""condition_frame_length, in latent frames."""
AXES = {"left and right": (1.0, 0.0), "up and down": (0.0, 1.0)}  # (x, y)


class World(ABC):
    """What is sampled: networks, text, data and what real long videos look like."""

    num_frames: int
    guidance: float
    batch_size: int
    lr: float
    fine_steps: tuple[int, int]
    """Midpoint steps of the converged teacher: of first clips, and of those with reference frames, whose paths bend less."""
    has_codec = False

    text: Any
    teacher: nn.Module

    @abstractmethod
    def student(self) -> nn.Module:
        """A new student: the teacher's weights, to be trained."""

    @abstractmethod
    def batch(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Clean latents of clips, and model_args, as Open-Sora's train.py has them."""

    @abstractmethod
    def prompts(self, count: int) -> list[str]: ...

    @abstractmethod
    def real(self, prompts: list[str], num_frames: int, seed: int) -> Tensor:
        """Latents of real long videos, [N, C, T, H, W]."""

    def sizes(self, count: int) -> dict[str, Tensor]:
        return {}

    def reencoded(self, latents: Tensor) -> Tensor:
        """Latents [N, C, T, H, W] once decoded and encoded; unchanged where there is no codec."""
        return latents


class SceneWorld(World):
    num_frames, guidance, batch_size, lr, fine_steps = 6, 2.0, 256, 2e-3, (64, 64)

    def __init__(self) -> None:
        self.scenes, self.text = Scenes.standard(), ClassText()
        self.teacher = SceneNetwork(self.scenes, self.num_frames, width=1).eval()  # untrained, the MLP adds nothing

    def student(self) -> nn.Module:
        return SceneNetwork(self.scenes, self.num_frames)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        class_idx = torch.randint(NUM_CLASSES, (self.batch_size,), generator=generator)
        return self.scenes.draw(class_idx, self.num_frames, generator), self.text.of(class_idx)

    def prompts(self, count: int) -> list[str]:
        return [f"class {i % NUM_CLASSES}" for i in range(count)]

    def real(self, prompts: list[str], num_frames: int, seed: int) -> Tensor:
        class_idx = torch.tensor([int(prompt.split()[1]) for prompt in prompts])
        return self.scenes.draw(class_idx, num_frames, torch.Generator().manual_seed(seed))


class VideoWorld(World):
    """Shapes that bounce between walls; a clip is any piece of such a video."""

    num_frames, guidance, batch_size, lr, fine_steps = 5, 2.0, 12, 3e-4, (48, 14)
    has_codec = True

    def __init__(self, out: Path, steps: list[int], seed: int) -> None:
        self.codec, self.text = TinyVAE(), TinyTextEncoder()
        latents, chosen = self._data(360, 64, seed, out / f"clips_seed{seed}.safetensors")
        # every piece of num_frames latent frames is a clip
        pieces = latents.unfold(2, self.num_frames, 1).movedim(2, 1).movedim(-1, 3)
        self._clips = pieces.flatten(0, 1)
        self._clip_captions = [caption for caption in chosen for _ in range(pieces.shape[1])]
        self._encoded = self.text.encode(self._clip_captions)
        self.weights = WEIGHTS
        for cycle, count in enumerate(steps):
            start = self.weights
            self.weights = out / f"teacher_{'_'.join(map(str, steps[: cycle + 1]))}_seed{seed}.safetensors"
            if self.weights.is_file():
                continue
            teacher, _ = train_teacher(
                self._clips, self._clip_captions, height=HEIGHT, width=WIDTH, steps=count, batch_size=16, lr=6e-4,
                seed=seed + cycle, save_every=50, save=self.weights.with_name("teacher_unfinished.safetensors"), start=start,
                draw_masks=lambda count, generator: head_masks(count, self.num_frames, generator),
            )  # fmt: skip
            save_weights(teacher, self.weights)
        self.teacher = TinySTDiT(from_pretrained=self.weights).eval()
        self.text.y_embedder = self.teacher.y_embedder

    def student(self) -> nn.Module:
        return TinySTDiT(from_pretrained=self.weights)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(self._clips), (self.batch_size,), generator=generator)
        return self._clips[index], {**{key: value[index] for key, value in self._encoded.items()}, **self.sizes(len(index))}

    def prompts(self, count: int) -> list[str]:
        known = captions()
        return [known[i * 7 % len(known)] for i in range(count)]  # 7: neighbours differ in colour, shape and axis

    def real(self, prompts: list[str], num_frames: int, seed: int) -> Tensor:
        rng = np.random.default_rng(1000 + seed)
        return self.encode(np.stack([bouncing_clip(rng, prompt, 4 * num_frames) for prompt in prompts]))

    def sizes(self, count: int) -> dict[str, Tensor]:
        values = {"num_frames": 4 * self.num_frames, "height": HEIGHT, "width": WIDTH, "ar": HEIGHT / WIDTH, "fps": FPS}
        return {key: torch.full((count,), float(value)) for key, value in values.items()}

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 [N, 4 T, H, W, 3] -> latents [N, 4, T, H/8, W/8]. Groups of four frames throughout, as a piece from the middle
        of a video has: codec.encode would repeat the first of every 17 frames, as if each clip began at rest."""
        parts = tqdm(np.array_split(frames, max(1, len(frames) // 10)), desc="encoding clips", unit="batch")
        return torch.cat([self._latents(self.codec.split_groups(frames_to_tensor(part)), len(part)) for part in parts])

    @torch.no_grad()
    def reencoded(self, latents: Tensor) -> Tensor:
        return self._latents(self.codec.decode_groups(latents.transpose(1, 2).flatten(0, 1)), len(latents))

    def _latents(self, groups: Tensor, count: int) -> Tensor:
        """Groups of `count` videos, [count T, 12, 8 H, 8 W] -> [count, 4, T, H, W]."""
        encoded = self.codec.encode_groups(groups) - self.codec.latent_shift[:, None, None]
        return (encoded / self.codec.latent_scale[:, None, None]).unflatten(0, (count, -1)).transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Inverse of `encode`."""
        return tensor_to_frames(
            self.codec.merge_groups(self.codec.decode_groups(latents.transpose(1, 2).flatten(0, 1)), len(latents))
        )

    def _data(self, num_videos: int, num_frames: int, seed: int, kept: Path) -> tuple[Tensor, list[str]]:
        rng, known = np.random.default_rng(seed), captions()
        chosen = [known[i % len(known)] for i in range(num_videos)]
        if not kept.is_file():
            frames = [bouncing_clip(rng, caption, num_frames) for caption in tqdm(chosen, desc="drawing videos", unit="video")]
            with replacing(kept) as temporary:
                save_file({"latents": self.encode(np.stack(frames)).contiguous()}, temporary)
        return load_file(kept)["latents"], chosen


def captions() -> list[str]:
    """Every caption of the bouncing shapes: 6 colours, 3 shapes, 2 axes."""
    return [f"a {color} {shape} bouncing {axis}" for color, shape, axis in itertools.product(COLORS, SHAPES, AXES)]


def bouncing_clip(rng: np.random.Generator, caption: str, num_frames: int) -> np.ndarray:
    """A shape that moves to and fro between two walls, from any point of its way: uint8 [num_frames, H, W, 3]."""
    _, color, shape, _, *axis = caption.split()
    radius = HEIGHT * rng.uniform(0.15, 0.19)
    low, free = radius + 1.5, np.array([WIDTH, HEIGHT], dtype=np.float64) - 2 * (radius + 1.5)
    speed = rng.uniform(0.34, 0.42) / 16  # of the free way, a frame
    way = rng.uniform(0, 2) + speed * np.arange(num_frames)
    along = 1 - np.abs(1 - way % 2)  # 0 at one wall, 1 at the other
    place = np.where(np.array(AXES[" ".join(axis)]) > 0, along[:, None], rng.uniform())
    return draw_shape(color, shape, low + place * free, radius)


def head_masks(count: int, num_frames: int, generator: torch.Generator, share: float = 0.5) -> Tensor:
    """bool [count, T]: in `share` of the samples the first 1..SHARED frames are given (False), in the others none."""
    length = torch.randint(1, SHARED + 1, (count, 1), generator=generator)
    masked = torch.rand(count, 1, generator=generator) < share
    return torch.arange(num_frames) >= torch.where(masked, length, 0)
