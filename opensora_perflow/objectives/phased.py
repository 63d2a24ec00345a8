"""The phased target of Rectified Diffusion: errors count at the end of the window that they lead to."""

from torch import Tensor

from opensora_perflow.method.segment import Segment, mean_over_frames
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.registry import OBJECTIVES


@OBJECTIVES.register_module("perflow_phased")
def perflow_phased(student: Velocity, segment: Segment, t: Tensor, frame_weights: Tensor | None = None) -> Tensor:
    r"""|| x_t + (t_e - t) student(x_t, t) - x_e ||^2 / (t_s - t_e)^2, averaged over elements.

    One step from x_t to the window's clean edge is compared with the teacher's solution there. On a rectified flow's path the
    first-order curve through x_s and x_e is PeRFlow's straight line. So this is PeRFlow's error weighted with
    ((t - t_e) / (t_s - t_e))^2. The weight is 1 at the noisy edge, where a few-step sampler evaluates, and 0 at the clean one.

    Args: as `objectives.perflow`.

    Returns:
        Loss per sample, [B], float32, with the student's graph.

    Source: Rectified Diffusion (arXiv:2410.07303), its phased variant, whose public training script compares states at the end
    of the phase. The division by the window's length, which gives all windows one scale, is ours.
    """
    rest = ((t - segment.t_end) / (segment.t_start - segment.t_end)).square()
    error = segment.error(student(segment.point(t), t), t)
    loss = mean_over_frames(error.square(), frame_weights)
    return loss * rest.to(loss.device, loss.dtype)
