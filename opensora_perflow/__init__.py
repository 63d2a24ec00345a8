"""Piecewise Rectified Flow (PeRFlow, arXiv:2405.07510) for Open-Sora: few-step video generation.

Importing the package registers `perflow` in the SCHEDULERS of Open-Sora 1.x, and `perflow_flux` in the MODELS of 2.0. Without
Open-Sora, a registry of this package takes their place. The import also lets a script's settings be checked before its models
are built. Nothing else changes.
See `conventions` for time, sign and shapes.
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

# torch is loaded with the package, which takes seconds on a busy machine: a command that takes longer says so before.
_COMMAND, _AS_MODULE = sys.argv[1:2], sys.argv[0] == "-m" and "opensora_perflow" in sys.orig_argv
if _COMMAND and _COMMAND[0] in ("demo", "ui", "plan", "curve") and (_AS_MODULE or Path(sys.argv[0]).stem == "opensora-perflow"):
    print(f"opensora-perflow {_COMMAND[0]}: loading torch", file=sys.stderr, flush=True)

from opensora_perflow.hosts.v1.early import check_early
from opensora_perflow.hosts.v1.scheduler import PeRFlow
from opensora_perflow.hosts.v2.early import register_with_host
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.registry import OBJECTIVES, SCHEDULERS, build_module

__all__ = ["OBJECTIVES", "PeRFlow", "SCHEDULERS", "TimeWindows", "__version__", "build_module"]

check_early()
register_with_host()
