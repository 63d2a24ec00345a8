"""Training objectives, one file each. Importing this folder registers them."""

from opensora_perflow.objectives.combination import combine
from opensora_perflow.objectives.consistency import perflow_consistency
from opensora_perflow.objectives.continuity import perflow_continuity
from opensora_perflow.objectives.direction import perflow_direction
from opensora_perflow.objectives.huber import perflow_huber
from opensora_perflow.objectives.motion import perflow_motion
from opensora_perflow.objectives.perflow import perflow
from opensora_perflow.objectives.phased import perflow_phased
from opensora_perflow.objectives.window_pair import WindowPair, counted_frames, mean_over_frames

__all__ = [
    "WindowPair",
    "combine",
    "counted_frames",
    "mean_over_frames",
    "perflow",
    "perflow_consistency",
    "perflow_continuity",
    "perflow_direction",
    "perflow_huber",
    "perflow_motion",
    "perflow_phased",
]
