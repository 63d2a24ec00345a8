"""The PeRFlow objective (arXiv:2405.07510, eq. 4): match the constant velocity of each window's straight line."""

from torch import Tensor

from opensora_perflow.method.segment import Segment, mean_over_frames
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.registry import OBJECTIVES


@OBJECTIVES.register_module("perflow")
def perflow(student: Velocity, segment: Segment, t: Tensor, frame_weights: Tensor | None = None) -> Tensor:
    r"""|| student(x_t, t) - (x_e - x_s) / (t_e - t_s) ||^2, averaged over elements.

    Args:
        student: The network being trained, as a velocity field.
        segment: Ends of each sample's window.
        t: Drawn times inside the windows, [B], float64.
        frame_weights: [B, T], see `mean_over_frames`.

    Returns:
        Loss per sample, [B], float32, with the student's graph.
    """
    return mean_over_frames(segment.error(student(segment.point(t), t), t).square(), frame_weights)
