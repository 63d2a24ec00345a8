"""One step of PeRFlow (arXiv:2405.07510): match the straight lines of the teacher's segments, see segments.py."""

from __future__ import annotations

from torch import Tensor

from opensora_perflow.method.segment import Segment
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.objectives import Objective
from opensora_perflow.training.players import Batch


def distil(batch: Batch, objective: Objective, segment: Segment, student: Velocity) -> Tensor:
    """The losses of one step: [B], float32, with the student's graph.

    Args:
        batch: What the host handed over.
        objective: What is minimised at each drawn time, see objectives/.
        segment: The teacher's solution of the windows that were drawn.
        student: As it is trained, on the line of the segment.
    """
    total = 0.0
    # One evaluation a time, not one with repeated rows: conditions are made for the batch as it is.
    for t, weight in zip(batch.drawn.times, batch.drawn.weights):
        loss = objective(student, segment, t, batch.frame_weights)
        total = total + loss * weight.to(loss.device, loss.dtype)
    return total
