"""What the running host script was told: whether it resumes, and where its weights came from.

Open-Sora gives a scheduler neither its config nor its checkpoint, and it builds schedulers before it loads anything. Every
script of every 1.x tag keeps its config in a variable `cfg` of its own main(), from which the scheduler's methods are called:
that is where this looks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main_variable(name: str) -> Any:
    """A variable of main() of the Open-Sora script that is calling; None where it has none, or when called from elsewhere."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "main":
            variables = frame.f_locals
            config, found = variables.get("cfg"), variables.get(name)
            # Up to Python 3.12 this is a copy that the frame keeps, and with it the first batch on the GPU for the whole run. A
            # debugger writes such a copy back, so that there it stays.
            if isinstance(variables, dict) and sys.gettrace() is None:
                variables.clear()
            if hasattr(config, "get") and config.get("scheduler") is not None:
                return found
        frame = frame.f_back
    return None


def running_config() -> Mapping[str, Any] | None:
    """The config of the Open-Sora script that is calling, or None when called from elsewhere."""
    return main_variable("cfg")


def loaded_weights() -> str | None:
    """Where the running script's network got its weights before any training: model.from_pretrained, or --ckpt-path."""
    return ((running_config() or {}).get("model") or {}).get("from_pretrained")


def host_seed() -> int | None:
    """The seed in the running script's config; None where there is no script, or none in its config (Open-Sora seeds itself
    with 1024 then, see torch.initial_seed)."""
    return (running_config() or {}).get("seed")


def trained_students(weights: str | Path) -> bool:
    """Did a PeRFlow run write these weights? Open-Sora's train.py dumps its config as config.txt into the folder above."""
    path = Path(weights)
    for folder in (path, *path.parents[:3]):
        try:
            config = json.loads((folder / "config.txt").read_text())
        except (OSError, ValueError, RecursionError):
            continue
        scheduler = config.get("scheduler") if isinstance(config, dict) else None
        return isinstance(scheduler, dict) and str(scheduler.get("type", "")).startswith("perflow")
    return False
