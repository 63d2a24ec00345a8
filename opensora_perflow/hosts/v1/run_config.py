"""What the running host script was told: whether it resumes, and where its weights came from.

Open-Sora gives a scheduler neither its config nor its checkpoint, and it builds schedulers before it loads anything. Every
script of every 1.x tag keeps its config in a variable `cfg` of its own main(), from which the scheduler's methods are called:
that is where this looks.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora_perflow.training.recipe import TeacherConfig
from opensora_perflow.training.state import find_state

logger = logging.getLogger("opensora_perflow")


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


def is_distilled(checkpoint: str | Path) -> bool:
    """Was this checkpoint written by a PeRFlow training run?

    It has a state (see state.py); or Open-Sora's train.py dumped such a config as config.txt into the folder above it.
    """
    if find_state(checkpoint) is not None:
        return True
    path = Path(checkpoint)
    for folder in (path, *path.parents[:3]):
        try:
            config = json.loads((folder / "config.txt").read_text())
        except (OSError, ValueError):
            continue
        scheduler = config.get("scheduler") if isinstance(config, dict) else None
        return isinstance(scheduler, dict) and str(scheduler.get("type", "")).startswith("perflow")
    return False


def check_teacher_source(teacher: TeacherConfig) -> str:
    """Where the teacher's weights will come from, in words for the log. Warns where a student is expected and none is known.

    Raises:
        ValueError: a resumed student would become its own teacher; or the teacher is itself a PeRFlow student and the config
            does not say that this is meant.
    """
    config, pretrained = running_config() or {}, loaded_weights()
    suggestion = f'teacher=dict(from_pretrained="{pretrained or "<the checkpoint that the run started from>"}")'
    source = teacher.from_pretrained
    if source is None and config.get("load"):
        raise ValueError(
            f"this run resumes from {config.get('load')!r}, so its weights are already those of a student and must not become "
            f'its teacher; say where the teacher is: scheduler = dict(type="perflow", {suggestion}, ...)'
        )
    weights = pretrained if source is None else source
    distilled = weights is not None and is_distilled(weights)
    if teacher.allow_distilled and not distilled:
        logger.warning(
            "teacher.allow_distilled expects a PeRFlow student, but nothing says that %s one: no perflow.json lies beside "
            "them. A later stage starts from the checkpoint of the one before: --ckpt-path, or teacher.from_pretrained",
            "this run's first weights are" if weights is None else f"the weights {str(weights)!r} are",
        )
    if distilled and not teacher.allow_distilled:
        raise ValueError(
            f"the teacher's weights {str(weights)!r} were written by a PeRFlow run: they are a student's; name the original "
            "model in teacher=dict(from_pretrained=...), or accept the student as teacher of a later stage with "
            "teacher=dict(..., allow_distilled=True)"
        )
    if source is not None:
        return f"weights from {source}"
    return "a copy of the student's weights at this run's first step" + (f" (loaded from {pretrained})" if pretrained else "")
