"""How errors become one loss a sample."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def mean_over_frames(error: Tensor, frame_weights: Tensor | None) -> Tensor:
    """Mean of an elementwise error over everything but the batch: [B, C, T, ...] -> [B], float32.

    Args:
        error: Errors, [B, C, T, H, W]; any [B, ...] if frame_weights is None.
        frame_weights: Weight of each frame, [B, T], or None for equal weights. A frame of weight 0 (a frozen frame) neither
            counts nor dilutes the mean; a sample without any weight has loss 0.
    """
    error = error.float()
    if frame_weights is None:
        return error.flatten(1).mean(dim=1)
    per_frame = rearrange(error, "b c t ... -> b t (c ...)").mean(dim=2)
    weights = frame_weights.to(per_frame.dtype)
    total = weights.sum(dim=1)
    return (per_frame * weights).sum(dim=1) / total.where(total > 0, total.new_ones(()))
