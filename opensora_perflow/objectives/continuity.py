"""Continuity across window edges: just above an edge the student moves as at it. Meant to be added to another objective."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_perflow.objectives.window_pair import WindowPair, mean_over_frames
from opensora_perflow.registry import OBJECTIVES
from opensora_perflow.solvers import Velocity


@OBJECTIVES.register_module("perflow_continuity")
def perflow_continuity(
    student: Velocity, pair: WindowPair, t: Tensor, frame_weights: Tensor | None = None, *, delta: float = 0.05
) -> Tensor:
    r"""|| student(x_s, t_s + d) - student(x_s, t_s) ||^2, averaged over elements, with d = delta (t_s - t_e).

    t_s is the noisy edge of the drawn window and belongs to it, t_s + d lies in the window above. The value at the edge, where
    a sampler evaluates and the target is a function of the state, has no gradient: the end of the upper window turns towards
    the lower one, not the other way. A window that starts at t = 1 has no edge: d is cut there, and the loss is 0.

    Args: as `objectives.perflow`; the drawn time plays no part;
        delta: Distance above the edge, as a share of the drawn window's length, > 0.

    Returns:
        Loss per sample, [B], float32, with the student's graph. Student evaluations: 2 (one without gradient) for each time
        that a solution feeds (`draws.per_solve`).

    Raises:
        ValueError: delta is not > 0.

    Source: none that we know; the jump that it penalises is `metrics.velocity_jump`.
    """
    if not delta > 0:
        raise ValueError(f"perflow_continuity needs delta > 0, got {delta!r}; write for example delta=0.05")
    above = torch.minimum(pair.t_start + delta * (pair.t_start - pair.t_end), torch.ones_like(pair.t_start))
    with torch.no_grad():
        v_edge = student(pair.x_start, pair.t_start)
    error = mean_over_frames((student(pair.x_start, above) - v_edge).square(), frame_weights)
    return error * (above > pair.t_start).to(error.device, error.dtype)
