"""Open-Sora's checkpoints: it tells a scheduler neither when it saves one nor which it has loaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opensora_perflow.hosts.script import main_variable
from opensora_perflow.hosts.v1.masters import write_masters


def resumed_checkpoint() -> tuple[str, bool] | None:
    """The folder that the running script resumes from (--load), and whether it counts its steps from there.

    With --start-from-scratch (1.1 and later) it takes the weights and counts from 0. None: the script resumes nothing.
    """
    config = main_variable("cfg") or {}
    folder = config.get("load")
    return None if folder is None else (str(folder), not config.get("start_from_scratch", False))


def before_each_save(write: Callable[[Path], None]) -> bool:
    """Have `write(folder)` called in the first process whenever the running script saves a checkpoint into a folder.

    Before that every process writes its shard of ZeRO's masters there.
    train.py of every 1.x tag saves with `booster.save_model(model, folder/model, ...)` (opensora/utils/ckpt_utils.py, save)
    before anything else: that method of that one object is wrapped. `write` comes first: where it fails, nothing has been
    saved yet, and the script stops without a checkpoint that looks whole.

    Returns:
        False where no script with a booster is running, and nothing was done.
    """
    booster = main_variable("booster")
    save_model = getattr(booster, "save_model", None)
    if save_model is None:
        return False

    @functools.wraps(save_model)
    def save(model: Any, checkpoint: str, *args: Any, **options: Any) -> Any:
        folder = Path(checkpoint).parent
        write_masters(folder, model)
        if not dist.is_initialized() or dist.get_rank() == 0:
            write(folder)
        return save_model(model, checkpoint, *args, **options)

    booster.save_model = save
    return True
