"""Continuity across window edges: above an edge the student moves as at it. Meant to be added to another objective."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_perflow.conventions import expand_like
from opensora_perflow.objectives.window_pair import WindowPair, mean_over_frames
from opensora_perflow.registry import OBJECTIVES
from opensora_perflow.solvers import Velocity


@OBJECTIVES.register_module("perflow_continuity")
def perflow_continuity(
    student: Velocity, pair: WindowPair, t: Tensor, frame_weights: Tensor | None = None, *, reach: float = 0.5
) -> Tensor:
    r"""|| student(x_s + s v, t_s + s) - v ||^2 with v = student(x_s, t_s) and s = reach (t_s - t), averaged over elements.

    t_s is the noisy edge of the drawn window and belongs to it; t_s + s lies above, in the window before, on the line that
    the student takes from the edge, continued. A drawn time that is uniform in the window spreads s evenly over
    reach (t_s - t_e); one at the edge gives s = 0 and no loss, which leaves 1 - `draws.edge_mass` of the term's weight. v has
    no gradient: the end of the upper window turns towards the lower one, whose value at the edge a sampler starts from, and
    not the other way. A window that starts at t = 1 has no edge: s is cut there, and the loss is 0.

    Args: as `objectives.perflow`;
        reach: Greatest s, as a share of the drawn window's length, > 0.

    Returns:
        Loss per sample, [B], float32, with the student's graph. Student evaluations: 2 (one without gradient) for each time
        that a solution feeds (`draws.per_solve`).

    Raises:
        ValueError: reach is not > 0.

    Source: none that we know; for s -> 0 it is the square of `metrics.velocity_jump`.
    """
    if not reach > 0:
        raise ValueError(f"perflow_continuity needs reach > 0, got {reach!r}; write for example reach=0.5")
    above = torch.minimum(pair.t_start + reach * (pair.t_start - t), torch.ones_like(pair.t_start))
    with torch.no_grad():
        v_edge = student(pair.x_start, pair.t_start)
    x_above = pair.x_start + expand_like(above - pair.t_start, pair.x_start) * v_edge
    error = pair.in_units(student(x_above, above) - v_edge, above)
    loss = mean_over_frames(error.square(), frame_weights)
    return loss * (above > pair.t_start).to(loss.device, loss.dtype)
