"""Measures that the benchmarks alone need: bootstrap intervals, a student's turns at edges, the clips of a long video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_perflow.method.solvers import Velocity

RESAMPLES, COVERED = 1000, 0.95
"""Of the bootstrap: how often samples are drawn anew, and the share of the results that lies in an interval."""
BLOCK = 1024
"""Rows of the matrix of distances that are held at once."""


@dataclass(frozen=True)
class Estimate:
    """A measure of all samples, and the percentile interval of its bootstrap."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Tensor, resampled: Tensor) -> Estimate:
        """From the measure of the samples, and of each resample [R]."""
        outside = (1.0 - COVERED) / 2
        low, high = resampled.double().nanquantile(
            torch.tensor([outside, 1.0 - outside], dtype=torch.float64).to(resampled.device)
        )
        return cls(value.item(), low.item(), high.item())


def times_drawn(count: int, seed: int = 0) -> Tensor:
    """How often each of N samples is in each resample, N draws with replacement: [R, N], float32. The seed fixes all."""
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(RESAMPLES, count).scatter_add_(1, drawn, torch.ones(RESAMPLES, count))


def squared_errors(x: Tensor, reference: Tensor) -> Tensor:
    """Mean square difference of each sample [N, ...] from its reference: [N], float32."""
    return (x - reference).float().square().flatten(1).mean(dim=1)


def error_estimate(squared: Tensor) -> Estimate:
    """Endpoint error of samples with these `squared_errors` [N]."""
    return root_mean_square(squared).estimate


def energy_estimate(x: Tensor, y: Tensor) -> Estimate:
    """Energy distance of paired sets [N, ...], see metrics.energy_distance. A resample draws pairs."""
    return energy(x, y).estimate


@dataclass(frozen=True)
class Resampled:
    """A measure of samples, and of each resample [R], float64."""

    value: Tensor
    resampled: Tensor

    @property
    def estimate(self) -> Estimate:
        return Estimate.of(self.value, self.resampled)

    def __sub__(self, other: Resampled) -> Resampled:
        """The difference of two measures of the same samples."""
        return Resampled(self.value - other.value, self.resampled - other.resampled)

    @classmethod
    def mean(cls, measures: Sequence[Resampled]) -> Resampled:
        """Over measures of the same samples, with one seed, or of independent ones, with seeds of their own."""
        return cls(*(torch.stack(parts).mean(dim=0) for parts in zip(*((one.value, one.resampled) for one in measures))))


def energy(x: Tensor, y: Tensor, seed: int = 0) -> Resampled:
    """Energy distance of paired sets [N, ...], see metrics.energy_distance. The seed fixes which pairs a resample draws.

    Two draws of one pair are left out, as equal indices are in the measure: a sample is at distance 0 from itself.
    """
    x, y = x.flatten(1).float(), y.flatten(1).float()
    count, counts = len(x), times_drawn(len(x), seed).to(x).T
    total, resampled = x.new_zeros((), dtype=torch.float64), x.new_zeros(RESAMPLES, dtype=torch.float64)
    for first in range(0, count, BLOCK):
        rows = slice(first, first + BLOCK)
        kernel = _distances(x[rows], y) + _distances(y[rows], x) - _distances(x[rows], x) - _distances(y[rows], y)
        kernel[torch.arange(len(kernel)), torch.arange(len(kernel)) + first] = 0.0
        total += kernel.double().sum()
        resampled += (counts[rows] * (kernel @ counts)).double().sum(dim=0)
    pairs = count**2 - counts.double().square().sum(dim=0)
    resampled = torch.where(pairs > 0, resampled / pairs, torch.nan)  # of few samples all draws may be one
    return Resampled(total / (count * (count - 1)), resampled)


def root_mean_square(squared: Tensor, seed: int = 0) -> Resampled:
    """Root of the mean of squares [N], one a sample. The seed fixes which samples a resample draws."""
    return Resampled(squared.mean().sqrt(), (times_drawn(len(squared), seed).to(squared) @ squared / len(squared)).sqrt())


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5


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


def drift(clips: Tensor, seed: int = 0) -> Resampled:
    """How far a long video's loops go on changing: mean energy distance of the clips of loops 3, 4, ... to those of loop 2.

    Loop 1 is left out: it has no reference frames, so that its clips are distributed otherwise than continuations.

    Args:
        clips: The clips of every loop, [L, N, ...], L >= 3 loops, N >= 2 videos.
        seed: Of the resamples.

    Returns:
        0 where later loops' clips are distributed as those of loop 2, up to sampling noise.

    Raises:
        ValueError: fewer than three loops.
    """
    if len(clips) < 3:
        raise ValueError(f"drift is that of loops 3, 4, ... from loop 2: it needs at least three loops, got {len(clips)}")
    return Resampled.mean([energy(clip, clips[1], seed) for clip in clips[2:]])


def seam(video: Tensor, joints: Sequence[int], seed: int = 0) -> Resampled:
    """Temporal-difference energy across the joints of long videos over that inside their clips; 1: a joint cannot be told.

    Args:
        video: [B, C, T, H, W].
        joints: Indices of the frames that begin a clip: differences from the frame before them are counted as the joint's.
        seed: Of the resamples.

    Raises:
        ValueError: no joint, no difference that is not a joint, or one outside 1..T-1.
    """
    count = video.shape[2]
    if not joints or not all(1 <= joint < count for joint in joints) or len(set(joints)) == count - 1:
        raise ValueError(f"joints must be some of the frames 1..{count - 1}, and not all of them, got {list(joints)}")
    changes = video.float().diff(dim=2).square().mean(dim=(1, 3, 4)).double()
    at_joint = torch.zeros(count - 1, dtype=torch.bool, device=video.device)
    at_joint[[joint - 1 for joint in joints]] = True
    joint, inside = changes[:, at_joint].mean(dim=1), changes[:, ~at_joint].mean(dim=1)
    drawn = times_drawn(len(video), seed).to(changes)
    return Resampled(joint.mean() / inside.mean(), (drawn @ joint) / (drawn @ inside))


def nearest_clip_distance(clips: Tensor, seed: int = 0) -> Resampled:
    """How little a long video repeats itself: root mean square distance of each clip to the nearest other one of its video.

    Args:
        clips: The clips of every loop, [L, N, ...], L >= 2.
        seed: Of the resamples.

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
    nearest = distances.amin(dim=2).mean(dim=1)
    return Resampled(nearest.mean(), times_drawn(len(nearest), seed).to(nearest) @ nearest / len(nearest))
