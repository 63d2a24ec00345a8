"""Liger's RMSNorm and rotary embedding in torch, for Open-Sora 2.0.

models/mmdit/layers.py:25 and models/mmdit/math.py:4 import two Triton kernels, which run on CUDA alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_perflow.portable.imports import announce, has_cuda, is_installed, provide_modules, source_mentions

NAME = "liger_kernels"


class LigerRMSNormFunction:
    """x / sqrt(mean(x^2) + eps) * (offset + weight)."""

    @staticmethod
    def apply(
        x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, casting_mode: str = "llama", in_place: bool = True
    ) -> Tensor:
        """Normalise the last axis in float32, round to x's dtype, then scale.

        Args:
            x: [..., D]; `weight`: [D].
            casting_mode: "llama" alone: the rounding comes before the scale.
            in_place: Whether the kernel may use x's memory; has no effect here.

        Raises:
            ValueError: another casting mode.
        """
        if casting_mode != "llama":
            raise ValueError(
                f'casting_mode must be "llama", got {casting_mode!r}; install liger_kernel with CUDA for the others'
            )
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return normal.to(x.dtype) * (offset + weight)


class LigerRopeFunction:
    """Rotary embedding that pairs channel i with channel i + D / 2."""

    @staticmethod
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Turn each pair of channels by its angle, in the dtype of cos and sin.

        Args:
            q, k: [B, H, L, D], D even.
            cos, sin: [B, L, D] (or [1, L, D]); the second half repeats the first, and is not read.

        Returns:
            q and k, turned, in their own shapes and dtypes.
        """
        half = cos.shape[-1] // 2
        cos, sin = cos[:, None, :, :half], sin[:, None, :, :half]

        def turned(x: Tensor) -> Tensor:
            left, right = x.to(cos.dtype).split(half, -1)
            return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)

        return turned(q), turned(k)


def install() -> bool:
    if is_installed("liger_kernel") and has_cuda():
        return False
    if not source_mentions("opensora", "models/mmdit/layers.py", "liger_kernel"):
        return False
    modules = {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": LigerRMSNormFunction},
        "liger_kernel.ops.rope": {"LigerRopeFunction": LigerRopeFunction},
    }
    provide_modules(__name__, modules)
    reason = "has no kernel without CUDA" if not has_cuda() else "is not installed"
    announce(NAME, f"RMSNorm and rotary embedding are computed by torch, because liger_kernel {reason}")
    return True
