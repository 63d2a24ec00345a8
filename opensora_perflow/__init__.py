"""Piecewise Rectified Flow (PeRFlow, arXiv:2405.07510) for Open-Sora: few-step video generation.

Importing the package registers `perflow` in the SCHEDULERS of Open-Sora 1.x, and `perflow_flux` in the MODELS of 2.0. Without
Open-Sora, a registry of this package takes their place. The import also lets a script's settings be checked before its models
are built. Nothing else changes.
See `conventions` for time, sign and shapes.
"""

__version__ = "0.1.0"

from opensora_perflow.hosts.v1.early import check_early
from opensora_perflow.hosts.v1.scheduler import PeRFlow
from opensora_perflow.hosts.v2.early import register_with_host
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.registry import OBJECTIVES, SCHEDULERS, build_module

__all__ = ["OBJECTIVES", "PeRFlow", "SCHEDULERS", "TimeWindows", "__version__", "build_module"]

check_early()
register_with_host()
