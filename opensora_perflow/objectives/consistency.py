"""Consistency inside windows: from any two neighbouring states of a trajectory, the student reaches the same window end."""

import torch
from torch import Tensor

from opensora_perflow.conventions import expand_like
from opensora_perflow.method.segment import Segment, mean_over_frames
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.registry import OBJECTIVES

TARGETS = ("student", "solution")


@OBJECTIVES.register_module("perflow_consistency")
def perflow_consistency(
    student: Velocity, segment: Segment, t: Tensor, frame_weights: Tensor | None = None, *, target: str = "student"
) -> Tensor:
    r"""|| f(x_i, t_i) - f'(x_{i+1}, t_{i+1}) ||^2 / (t_s - t_e)^2, with f(x, t) = x + (t_e - t) student(x, t).

    x_i, x_{i+1} are the states of the teacher's own, curved, solution around the drawn time. t_i is the nearest grid time at or
    above t. f' is the student without gradient, and exactly x_e at the window's end.

    Args: as `objectives.perflow`; the segment needs the teacher's states;
        target: "student": f' as above. The papers do so too, with one step of the teacher in place of the whole solution.
            "solution": x_e for every state, without bootstrapping and with one evaluation less.

    Returns:
        Loss per sample, [B], float32, with the student's graph. Student evaluations: 2 (one without gradient), or 1.

    Raises:
        ValueError: unknown target, or a segment without states.

    Source: Phased Consistency Models (arXiv:2405.18407), section 3.1, and trajectory segmented consistency distillation,
    Hyper-SD (arXiv:2404.13686), section 3.1.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r} of perflow_consistency; known: {', '.join(TARGETS)}")
    if segment.states is None or segment.times is None:
        raise ValueError("perflow_consistency needs the teacher's states inside the window; give Segment states and times")
    # Grid times descend: the last one at or above t, but never the window's end itself.
    index = ((segment.times >= t).sum(dim=0) - 1).clamp(min=0, max=len(segment.times) - 2)
    rows = torch.arange(len(t), device=index.device)

    def jump(i: Tensor) -> Tensor:
        x, time = segment.states[i, rows], segment.times[i, rows]
        return x + expand_like(segment.t_end - time, x) * student(x, time)

    if target == "solution":
        goal = segment.x_end
    else:
        with torch.no_grad():
            goal = jump(index + 1)
        at_end = index + 1 == len(segment.times) - 1
        goal = torch.where(at_end.to(goal.device).reshape(-1, *[1] * (goal.dim() - 1)), segment.x_end, goal)
    error = (jump(index) - goal) / expand_like(segment.t_start - segment.t_end, goal)
    return mean_over_frames(segment.in_units(error, segment.times[index, rows]).square(), frame_weights)
