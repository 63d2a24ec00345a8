"""Motion matching: the student's error in what changes from frame to frame. Meant to be added to another objective."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_perflow.objectives.window_pair import WindowPair, mean_over_frames
from opensora_perflow.registry import OBJECTIVES
from opensora_perflow.solvers import Velocity


@OBJECTIVES.register_module("perflow_motion")
def perflow_motion(student: Velocity, pair: WindowPair, t: Tensor, frame_weights: Tensor | None = None) -> Tensor:
    r"""|| D (student(x_t, t) - (x_e - x_s) / (t_e - t_s)) ||^2, averaged over elements; D takes a frame from the next.

    An error that all frames share counts 0, one that is independent from frame to frame twice what it does in perflow, one that
    alternates from frame to frame four times. Weigh it beside perflow, as
    objective=[dict(type="perflow"), dict(type="perflow_motion", weight=0.5)]. One evaluation serves both.

    Args: as `objectives.perflow`, on [B, C, T, H, W]; a difference has the smaller of its two frames' weights: it counts where
        both count, since a frozen frame's velocity is put to 0 when sampling and means nothing here.

    Returns:
        Loss per sample, [B], float32, with the student's graph; 0 for samples without two neighbouring frames that count
        (images).

    Raises:
        ValueError: states that are not [B, C, T, H, W].

    Source: latent differences as a representation of motion in distillation: Motion Consistency Model (arXiv:2406.06890); here
    on the velocity, as a term beside the whole.
    """
    error = pair.in_units(student(pair.point(t), t) - pair.velocity, t)
    if error.dim() != 5:
        raise ValueError(f"perflow_motion needs videos [B, C, T, H, W], got {list(error.shape)}; use perflow alone")
    weights = torch.ones_like(error[:, 0, :, 0, 0]) if frame_weights is None else frame_weights
    both = torch.minimum(weights[:, 1:], weights[:, :-1])
    return mean_over_frames(error.diff(dim=2).square(), both)
