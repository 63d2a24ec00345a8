"""Packed latents of Open-Sora 2.0: their sizes, and how its sampler warps time for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A batch's latents [B, C, T, H, W] as tokens [B, T h w, C p p], with H = h p and W = w p.

    frames, rows, columns: T, h, w. patch: p.
    """

    frames: int
    rows: int
    columns: int
    patch: int

    @classmethod
    def of(cls, img_ids: Tensor, patch: int) -> Layout:
        """From the positions (t, y, x) of the tokens, [B, L, 3].

        Raises:
            ValueError: they are no full grid. In bfloat16, positions are exact up to 256.
        """
        frames, rows, columns = (int(size) + 1 for size in img_ids[0].float().amax(dim=0))
        if frames * rows * columns != img_ids.shape[1]:
            raise ValueError(
                f"the positions img_ids of {img_ids.shape[1]} tokens end at frame {frames - 1}, row {rows - 1}, column "
                f"{columns - 1}, which is no full grid; pass what Open-Sora 2.0's `prepare` makes, of at most 256 a side"
            )
        return cls(frames, rows, columns, patch)

    def unpack(self, tokens: Tensor) -> Tensor:
        """[B, L, C p p] -> [B, C, T, H, W]."""
        sizes = {"t": self.frames, "h": self.rows, "w": self.columns, "ph": self.patch, "pw": self.patch}
        return rearrange(tokens, "b (t h w) (c ph pw) -> b c t (h ph) (w pw)", **sizes)

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, L, C p p]."""
        return rearrange(latents, "b c t (h ph) (w pw) -> b (t h w) (c ph pw)", ph=self.patch, pw=self.patch)

    @property
    def alpha(self) -> float:
        """The ratio of `conventions.shift_time` at these sizes.

        Linear in the tokens of a frame, from 1 at 256 to 3 at 4096, times the root of the frames.

        Source: Open-Sora 2.0 opensora/utils/sampling.py, get_schedule. Its train.py divides H W by 4 whatever the patch is,
        and so differs for patches of 1; windows follow the sampler.
        """
        slope = (3 - 1) / (4096 - 256)
        return (slope * self.rows * self.columns + (1 - slope * 256)) * math.sqrt(self.frames)

    def warp(self, flow_shift: float | None) -> float:
        """`alpha`, whose place a `flow_shift` takes."""
        return self.alpha if flow_shift is None else flow_shift


def alphas(layout: Layout, flow_shift: float | None, batch_size: int, device: torch.device | str) -> Tensor:
    """The warp of each sample's time, [B], float64."""
    return torch.full((batch_size,), layout.warp(flow_shift), dtype=torch.float64, device=device)
