"""Piecewise Rectified Flow (PeRFlow, arXiv:2405.07510) for Open-Sora: few-step video generation.

Importing the package registers `perflow` in Open-Sora's SCHEDULERS. Without Open-Sora, a registry of the same name in this
package takes its place. The import also lets a script's settings be checked before its models are built. Nothing else changes.
See `conventions` for time, sign and shapes.
"""

__version__ = "0.1.0"

from opensora_perflow.hosts.v1.early import check_early
from opensora_perflow.hosts.v1.scheduler import PeRFlow
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.registry import OBJECTIVES, SCHEDULERS, build_module

__all__ = ["OBJECTIVES", "PeRFlow", "SCHEDULERS", "TimeWindows", "__version__", "build_module"]

check_early()
