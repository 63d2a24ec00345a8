"""A segment: what the teacher made of each sample's window, the straight line that the student learns there, and its error."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from einops import rearrange
from torch import Tensor

from opensora_perflow.conventions import expand_like


@dataclass(frozen=True)
class Segment:
    """A teacher's solution across one window per sample.

    x_start, x_end: states at the noisy and the clean edge, [B, ...], float32. t_start > t_end: the edges, [B], float64.
    states: the teacher's on its way, both edges included, [S + 1, B, ...], at `times` [S + 1, B], float64. None where the ends
    alone are known.
    units: t [B] -> the factor [B] that turns an error of the velocity at t into one of the network's output. Losses compare
    outputs. None where the network outputs velocities.
    """

    x_start: Tensor
    x_end: Tensor
    t_start: Tensor
    t_end: Tensor
    states: Tensor | None = None
    times: Tensor | None = None
    units: Callable[[Tensor], Tensor] | None = None

    def point(self, t: Tensor) -> Tensor:
        """x_t on the straight line between the edges (PeRFlow, arXiv:2405.07510, eq. 4); t [B] inside the window."""
        return self.x_start + (self.x_end - self.x_start) * expand_like(
            (t - self.t_start) / (self.t_end - self.t_start), self.x_start
        )

    @cached_property
    def velocity(self) -> Tensor:
        """dx/dt of the line, the same for every t of the window."""
        return (self.x_end - self.x_start) / expand_like(self.t_end - self.t_start, self.x_start)

    def bounds(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(t_start, t_end): the segment's window, for every t in it. Its clean edge counts as inside."""
        return self.t_start, self.t_end

    def error(self, v: Tensor, t: Tensor) -> Tensor:
        """How far a velocity at times t [B] is from the line's, as an error of the network's output."""
        return self.in_units(v - self.velocity, t)

    def in_units(self, error: Tensor, t: Tensor) -> Tensor:
        """An error of the velocity at t [B] as one of the network's output."""
        return error if self.units is None else error * expand_like(self.units(t), error)


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
