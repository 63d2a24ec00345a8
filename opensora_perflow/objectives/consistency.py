"""Consistency inside windows: from any two neighbouring states of a trajectory, the student reaches the same window end."""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_perflow.conventions import expand_like
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.objectives.window_pair import WindowPair, mean_over_frames
from opensora_perflow.registry import OBJECTIVES

TARGETS = ("student", "solution")


@OBJECTIVES.register_module("perflow_consistency")
def perflow_consistency(
    student: Velocity, pair: WindowPair, t: Tensor, frame_weights: Tensor | None = None, *, target: str = "student"
) -> Tensor:
    r"""|| f(x_i, t_i) - f'(x_{i+1}, t_{i+1}) ||^2 / (t_s - t_e)^2, with f(x, t) = x + (t_e - t) student(x, t).

    x_i, x_{i+1} are the states of the teacher's own, curved, solution around the drawn time: t_i is the nearest grid time
    at or above t. f' is the student without gradient, and exactly x_e at the window's end.

    Args: as `objectives.perflow`; the pair needs the teacher's path;
        target: "student": f' as above, as in the papers, which take one step of the teacher where this has the whole
            solution; "solution": x_e for every state, without bootstrapping and with one evaluation less.

    Returns:
        Loss per sample, [B], float32, with the student's graph. Student evaluations: 2 (one without gradient), or 1.

    Raises:
        ValueError: unknown target, or a pair without a path.

    Source: Phased Consistency Models (arXiv:2405.18407), section 3.1, and trajectory segmented consistency distillation,
    Hyper-SD (arXiv:2404.13686), section 3.1.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r} of perflow_consistency; known: {', '.join(TARGETS)}")
    if pair.path is None or pair.path_times is None:
        raise ValueError(
            "perflow_consistency needs the teacher's states inside the window; give WindowPair path and path_times"
        )
    # Grid times descend: the last one at or above t, but never the window's end itself.
    index = ((pair.path_times >= t).sum(dim=0) - 1).clamp(min=0, max=len(pair.path_times) - 2)
    rows = torch.arange(len(t), device=index.device)

    def jump(i: Tensor) -> Tensor:
        x, time = pair.path[i, rows], pair.path_times[i, rows]
        return x + expand_like(pair.t_end - time, x) * student(x, time)

    if target == "solution":
        goal = pair.x_end
    else:
        with torch.no_grad():
            goal = jump(index + 1)
        at_end = index + 1 == len(pair.path_times) - 1
        goal = torch.where(at_end.to(goal.device).reshape(-1, *[1] * (goal.dim() - 1)), pair.x_end, goal)
    error = (jump(index) - goal) / expand_like(pair.t_start - pair.t_end, goal)
    return mean_over_frames(pair.in_units(error, pair.path_times[index, rows]).square(), frame_weights)
