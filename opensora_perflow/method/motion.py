"""How much a student moves, window by window, beside its teacher: motion is what few-step students lose first."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.conventions import expand_like
from opensora_perflow.method.metrics import temporal_difference_energy
from opensora_perflow.method.solvers import Velocity


@dataclass(frozen=True)
class WindowMotion:
    """Temporal-difference energies of the clean videos that one window points at, as `metrics.temporal_difference_energy`."""

    teacher: float
    student: float
    error: float
    """Of the difference between both videos: 0 only if the same things move in the same way."""


@torch.no_grad()
def motion_report(student: Velocity, states: Sequence[Tensor], edges: Tensor) -> list[WindowMotion]:
    """Motion of one student step from the teacher's state at each window's noisy edge, on a rectified flow's path.

    A state between noise and data moves mostly because its noise does. So what is compared is the clean video that a window's
    velocity points at, x - t v. The teacher's v is (x_end - x_start) / (t_end - t_start), the student's its velocity at the
    noisy edge. In the last window these are the window's ends themselves.

    With fields `teacher` and `student` on the same noise and prompts:

        edges = shift_time(torch.tensor(windows.edges, dtype=torch.float64)[:, None].expand(-1, len(noise)), ratio)
        states = [noise]
        for start, end in zip(edges, edges[1:]):
            states.append(solve(teacher, states[-1], linear_grid(start, end, 32)))
        report = motion_report(student, states, edges)

    Args:
        student: Its field, guided as it is sampled; called once a window.
        states: The teacher's states at the edges, K + 1 tensors [B, C, T, H, W].
        edges: [K + 1, B] or [K + 1], flow times, float64, descending.

    Returns:
        One row a window, the noisiest first; all energies are 0 for images (T = 1).

    Raises:
        ValueError: not one state for each edge.
    """
    if len(states) != len(edges):
        raise ValueError(f"motion_report needs the teacher's state at each edge, got {len(states)} states, {len(edges)} edges")
    rows = []
    for x, x_end, t, t_end in zip(states, states[1:], edges, edges[1:]):
        t, t_end = t.expand(len(x)), t_end.expand(len(x))
        clean_teacher = x - expand_like(t, x) * (x_end - x) / expand_like(t_end - t, x)
        clean_student = x - expand_like(t, x) * student(x, t)
        videos = (clean_teacher, clean_student, clean_student - clean_teacher)
        rows.append(WindowMotion(*(temporal_difference_energy(video) for video in videos)))
    return rows
