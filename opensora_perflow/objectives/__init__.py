"""Training objectives, one file each. Importing this folder registers them."""

from opensora_perflow.objectives.perflow import perflow
from opensora_perflow.objectives.window_pair import WindowPair, mean_over_frames

__all__ = ["WindowPair", "mean_over_frames", "perflow"]
