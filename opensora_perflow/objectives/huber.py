"""PeRFlow with a pseudo-Huber distance: squared for small errors, linear for large ones."""

from __future__ import annotations

from torch import Tensor

from opensora_perflow.objectives.window_pair import WindowPair, mean_over_frames
from opensora_perflow.registry import OBJECTIVES
from opensora_perflow.solvers import Velocity


@OBJECTIVES.register_module("perflow_huber")
def perflow_huber(
    student: Velocity, pair: WindowPair, t: Tensor, frame_weights: Tensor | None = None, *, c: float = 0.00054
) -> Tensor:
    r"""sqrt(m + c^2) - c, with m the mean squared velocity error of the sample (what `perflow` returns).

    Args: as `objectives.perflow`;
        c: Root mean square error at which squared turns into linear, > 0. Large c gives m / (2 c).

    Returns:
        Loss per sample, [B], float32, with the student's graph.

    Raises:
        ValueError: c is not > 0.

    Source: Song and Dhariwal, Improved Techniques for Training Consistency Models (arXiv:2310.14189), section 3.3:
    sqrt(|e|^2 + c^2) - c with c = 0.00054 sqrt(D); both sides are divided by sqrt(D) here, so that c does not depend on the
    video's size.
    """
    if not c > 0:
        raise ValueError(f'perflow_huber needs c > 0, got {c!r}; for the squared error use objective="perflow"')
    error = pair.in_units(student(pair.point(t), t) - pair.velocity, t)
    mean_square = mean_over_frames(error.square(), frame_weights)
    return (mean_square + c**2).sqrt() - c
