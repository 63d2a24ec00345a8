"""An objective for few evaluations: the energy distance from where the student's steps end to where the teacher's windows do.

Registered as `perflow_energy`, as docs/extending.md has it. Meant to be added to another objective:

    objective=[dict(type="perflow"), dict(type="perflow_energy", weight=8.0, motion=1.0)]

One evaluation serves both. No network is asked further, no score is learned. It wants several samples of a window in each
process's batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_perflow.conventions import expand_like
from opensora_perflow.method.segment import Segment
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.registry import OBJECTIVES


@OBJECTIVES.register_module("perflow_energy")
def perflow_energy(
    student: Velocity, segment: Segment, t: Tensor, frame_weights: Tensor | None = None, motion: float = 0.0
) -> Tensor:
    r"""2 E|X - Y| - E|X - X'| - E|Y - Y'| of ends X of the student's steps from t and ends Y of the windows, within the batch.

    Ends are divided by the window's length, as errors of the velocity are; distances by the square root of the dimension.
    Each sample is paired with every other one of its window.

    Args: as `objectives.perflow`; frame_weights must be None.
        motion: Weight of the same distance between differences of neighbouring frames.

    Returns:
        Each sample's part, [B], float32; 0 for one that is alone in its window. The mean is an unbiased estimate, and may be
        negative.

    Source: Szekely and Rizzo, Energy statistics (2013), eq. 2; as a loss of generators: Cramer GAN (arXiv:1705.10743).
    """
    if frame_weights is not None:
        raise ValueError("perflow_energy knows no frames that stand still, got frame_weights; leave the objective out")
    length = expand_like(segment.t_start - segment.t_end, segment.x_end)
    x = segment.point(t)
    ends = x + expand_like(segment.t_end - t, x) * student(x, t)
    ends, others = (ends / length).float(), (segment.x_end / length).float()
    same = (segment.t_start[:, None] == segment.t_start) & (segment.t_end[:, None] == segment.t_end)
    same = (same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)).float()
    loss = _energy(ends, others, same)
    if motion and ends.shape[2] > 1:
        loss = loss + motion * _energy(ends.diff(dim=2), others.diff(dim=2), same)
    return loss


def _energy(x: Tensor, y: Tensor, pairs: Tensor) -> Tensor:
    """Each sample's mean over the others that it is paired with, [B]; pairs [B, B] of 0 and 1."""
    kernel = _distances(x, y) + _distances(y, x) - _distances(x, x) - _distances(y, y)
    return (kernel * pairs).sum(dim=1) / pairs.sum(dim=1).clamp(min=1.0)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    difference = x.flatten(1)[:, None] - y.flatten(1)[None]
    return (difference.square().mean(dim=2) + 1e-12).sqrt()  # the gradient of a root at 0 is not finite
