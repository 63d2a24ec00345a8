"""Open-Sora's checkpoints: where a run goes on from, and what is written beside each of them.

Open-Sora tells a scheduler neither when it saves a checkpoint nor which it has loaded.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opensora_perflow.hosts.masters import write_masters
from opensora_perflow.hosts.script import main_variable

SAVES = ("save_model", "save_lora_as_pretrained")
"""Methods of a booster that open a checkpoint, called as (model, a folder inside the checkpoint's, ...)."""


def resumed_checkpoint() -> tuple[str, bool] | None:
    """The folder that the running script resumes from (--load), and whether it counts its steps from there.

    With --start-from-scratch (1.1 and later) it takes the weights and counts from 0. None: the script resumes nothing.
    """
    config = main_variable("cfg") or {}
    folder = config.get("load")
    return None if folder is None else (str(folder), not config.get("start_from_scratch", False))


def before_each_save(write: Callable[[Path], None], everywhere: Callable[[Path], None] | None = None) -> bool:
    """Have `write(folder)` called in the first process whenever the running script saves a checkpoint into a folder.

    Before that every process writes its shard of ZeRO's masters there. train.py of every tag saves by one of SAVES before
    anything else: these methods of that one object are wrapped. `write` comes first. Where that fails, nothing has been saved
    yet, and the script stops without a checkpoint that looks whole. `everywhere(folder)` is called last, in every process.

    Returns:
        False where no script with a booster is running, and nothing was done.
    """
    booster = main_variable("booster")
    found = [name for name in SAVES if hasattr(booster, name)]
    for name in found:
        setattr(booster, name, _writing_first(getattr(booster, name), write, everywhere))
    return bool(found)


def _writing_first(
    save: Callable[..., Any], write: Callable[[Path], None], everywhere: Callable[[Path], None] | None
) -> Callable[..., Any]:
    @functools.wraps(save)
    def saving(model: Any, checkpoint: str, *args: Any, **options: Any) -> Any:
        folder = Path(checkpoint).parent
        write_masters(folder, model)
        if not dist.is_initialized() or dist.get_rank() == 0:
            write(folder)
        if everywhere is not None:
            everywhere(folder)
        return save(model, checkpoint, *args, **options)

    return saving
