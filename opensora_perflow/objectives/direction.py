"""Direction matching: the angle between the student's velocity and the window's. Meant to be added to another objective."""

from torch import Tensor

from opensora_perflow.method.segment import Segment, mean_over_frames
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.registry import OBJECTIVES


@OBJECTIVES.register_module("perflow_direction")
def perflow_direction(student: Velocity, segment: Segment, t: Tensor, frame_weights: Tensor | None = None) -> Tensor:
    r"""1 - cos(student(x_t, t), (x_e - x_s) / (t_e - t_s)), the angle taken over all elements of a sample.

    Blind to the velocity's magnitude: weigh it beside perflow, as
    objective=[dict(type="perflow"), dict(type="perflow_direction", weight=0.1)]. One evaluation serves both.

    Args: as `objectives.perflow`; frame_weights enter all three sums of the cosine.

    Returns:
        Loss per sample in [0, 2], [B], float32, with the student's graph. A sample whose window velocity is 0 has loss 1.

    Source: ProReflow (arXiv:2503.04824), aligned v-prediction: squared error plus a weighted 1 - cosine.
    """
    v, v_target = student(segment.point(t), t).float(), segment.velocity
    product, square, square_target = (
        mean_over_frames(value, frame_weights) for value in (v * v_target, v.square(), v_target.square())
    )
    # The bound keeps the gradient finite where a velocity vanishes.
    return 1.0 - product / (square * square_target).clamp(min=1e-12).sqrt()
