"""Training objectives, one file each. Importing this folder registers them."""

from opensora_perflow.method.segment import mean_over_frames
from opensora_perflow.objectives.combination import Objective, combine
from opensora_perflow.objectives.consistency import perflow_consistency
from opensora_perflow.objectives.direction import perflow_direction
from opensora_perflow.objectives.perflow import perflow
from opensora_perflow.objectives.phased import perflow_phased

__all__ = [
    "Objective",
    "combine",
    "mean_over_frames",
    "perflow",
    "perflow_consistency",
    "perflow_direction",
    "perflow_phased",
]
