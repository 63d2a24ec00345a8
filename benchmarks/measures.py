"""Measures that the benchmarks alone need: a student's turns at window edges, and how the clips of a long video go together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opensora_perflow.method.metrics import energy_distance
from opensora_perflow.method.solvers import Velocity


def velocity_jump(velocity: Velocity, x: Tensor, t_edge: Tensor, delta: float) -> float:
    """Root mean square change of a field across window edges: velocity(x, t_edge + delta) - velocity(x, t_edge).

    Args:
        velocity: The student's field; called twice.
        x: States at the edges, [B, ...].
        t_edge: Edges, [B], float64; an edge belongs to the window below it.
        delta: Distance above the edge in flow time, > 0 and short against the window above.
    """
    jump = velocity(x, t_edge + delta) - velocity(x, t_edge)
    return jump.float().square().mean().sqrt().item()


def drift(clips: Tensor) -> list[float]:
    """How far a long video's loops go from its first: the energy distance of the clips of each later loop to those of loop 1.

    Args:
        clips: The clips of every loop, [L, N, ...], N >= 2 videos.

    Returns:
        L - 1 numbers; 0 where a loop's clips are distributed as the first loop's, up to sampling noise.
    """
    return [energy_distance(clip, clips[0]) for clip in clips[1:]]


def seam(video: Tensor, joints: Sequence[int]) -> float:
    """Temporal-difference energy across the joints of a long video over that inside its clips; 1: a joint cannot be told.

    Args:
        video: [B, C, T, H, W].
        joints: Indices of the frames that begin a clip: differences from the frame before them are counted as the joint's.

    Raises:
        ValueError: no joint, no difference that is not a joint, or one outside 1..T-1.
    """
    count = video.shape[2]
    if not joints or not all(1 <= joint < count for joint in joints) or len(set(joints)) == count - 1:
        raise ValueError(f"joints must be some of the frames 1..{count - 1}, and not all of them, got {list(joints)}")
    energy = video.float().diff(dim=2).square().mean(dim=(0, 1, 3, 4))
    at_joint = torch.zeros(count - 1, dtype=torch.bool, device=video.device)
    at_joint[[joint - 1 for joint in joints]] = True
    return (energy[at_joint].mean() / energy[~at_joint].mean()).item()


def nearest_clip_distance(clips: Tensor) -> float:
    """How little a long video repeats itself: root mean square distance of each clip to the nearest other one of its video.

    Args:
        clips: The clips of every loop, [L, N, ...], L >= 2.

    Returns:
        Mean over clips and videos; 0 where every clip occurs twice.

    Raises:
        ValueError: fewer than two clips.
    """
    if len(clips) < 2:
        raise ValueError(f"repetition needs at least two clips of a video, got {len(clips)}")
    clips = clips.flatten(2).double().transpose(0, 1)
    distances = torch.cdist(clips, clips, compute_mode="donot_use_mm_for_euclid_dist") / clips.shape[2] ** 0.5
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return distances.amin(dim=2).mean().item()
