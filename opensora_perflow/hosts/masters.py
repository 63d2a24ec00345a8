"""The float32 masters of ColossalAI's ZeRO, which Open-Sora's checkpoints leave out.

ZeRO trains float32 masters in shards, one a process, and the network holds their roundings. train.py of every 1.x tag saves
the network, and its loader makes masters of the roundings. Here each process keeps its shard beside perflow.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_perflow.checkpoints import read_state_dict, write_state_dict
from opensora_perflow.hosts.parallel import gathered
from opensora_perflow.hosts.script import main_variable
from opensora_perflow.hosts.wrappers import unwrap, weights_dtype

FOLDER = "perflow_masters"
"""In a checkpoint folder; 4 bytes a parameter."""


def write_masters(folder: Path, model: nn.Module) -> None:
    """Write this process's shard of the running script's masters into a checkpoint folder, atomically; nothing without ZeRO.

    Raises:
        OSError: the file cannot be written.
    """
    masters = masters_of(model)
    if masters:
        write_state_dict(_file(folder), masters)


def restore_masters(folder: Path, model: nn.Module) -> str:
    """Put the masters of a checkpoint folder back, in all processes or in none. Every process has to call this.

    To be called after the host has loaded the checkpoint, and before a step.

    Returns:
        What weights the run goes on with, in words.
    """
    masters = masters_of(model)
    if not masters:  # of every parameter each process has a part
        return "the checkpoint's weights"
    kept, problem = {}, ""
    try:
        kept = _read(folder)
        _check(kept, masters, weights_dtype(unwrap(model)))
    except (OSError, ValueError) as error:
        problem = str(error)
    problem = next(filter(None, gathered(problem)), "")
    if problem:
        return f"the checkpoint's rounded weights, because ZeRO's float32 masters cannot be put back: {problem}"
    with torch.no_grad():
        for name, master in masters.items():
            master.copy_(kept[name])
    return "its float32 masters"


def masters_of(model: nn.Module) -> dict[str, Tensor]:
    """Name of a parameter -> this process's shard of its master, flat; empty without ZeRO."""
    ask = getattr(main_variable("optimizer"), "get_working_to_master_map", None)
    masters = (None if ask is None else ask()) or {}
    return {name: masters[id(value)] for name, value in unwrap(model).named_parameters() if id(value) in masters}


def _file(folder: Path) -> Path:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return folder / FOLDER / f"rank-{rank}-of-{size}.safetensors"


def _read(folder: Path) -> dict[str, Tensor]:
    file = _file(folder)
    if file.is_file():
        return read_state_dict(file)
    others = sorted({path.stem.rpartition("-")[2] for path in file.parent.glob("rank-*-of-*.safetensors")})
    here = file.stem.rpartition("-")[2]
    raise ValueError(
        f"{file.parent} holds shards of {' and '.join(others)} processes, and this run has {here}"
        if others and others != [here]
        else f"{file} is missing"
    )


def _check(kept: Mapping[str, Tensor], masters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raises ValueError unless kept masters round to the weights that were loaded, of which `masters` are copies."""
    shapes, expected = ({name: value.shape for name, value in of.items()} for of in (kept, masters))
    if shapes != expected:
        raise ValueError(f"{FOLDER} is of another network, or of another choice of parameters to train")
    for name, master in masters.items():
        if not torch.equal(kept[name].to(master.device, dtype), master.to(dtype)):
            raise ValueError(f"{FOLDER} does not belong to the checkpoint's weights: {name} does not round to them")


__all__ = ["FOLDER", "masters_of", "restore_masters", "write_masters"]
