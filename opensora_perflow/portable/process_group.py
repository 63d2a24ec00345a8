"""gloo where the host asks for nccl, and a world of one where a script wants a process group without torchrun.

scripts/train.py passes backend="nccl" (v1.2.0:50, v1.3:61) and reads rank and world size from torchrun's environment
variables. The variables are supplied at the moment a script asks for a group and not before. inference.py decides by WORLD_SIZE
whether it is distributed at all (utils/misc.py v1.2.0:20), and must stay a plain process.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.distributed as dist

from opensora_perflow.portable.imports import announce, has_cuda, when_imported

NAME = "process_group"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def provide_world_of_one() -> bool:
    """Set the variables torchrun would set for one process, unless a launcher has set RANK or WORLD_SIZE; were they set?"""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return False
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    return True


def _reads_environment(init_method: str | None, options: dict[str, Any]) -> bool:
    is_env = init_method is None or init_method.startswith("env://")
    return is_env and options.get("store") is None and options.get("rank", -1) < 0


def _with_gloo(init_process_group: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init_process_group)
    def init(backend: str | None = None, init_method: str | None = None, *args: Any, **options: Any) -> None:
        if _reads_environment(init_method, options):
            provide_world_of_one()
        init_process_group("gloo" if backend == "nccl" else backend, init_method, *args, **options)

    return init


def _launch_alone(module: ModuleType) -> None:
    # v1.0.0 and v1.1.0 always call it (scripts/inference.py v1.0.0:30), and it reads the variables before torch does.
    launch_from_torch = module.launch_from_torch

    @functools.wraps(launch_from_torch)
    def launch(*args: Any, **options: Any) -> Any:
        provide_world_of_one()
        return launch_from_torch(*args, **options)

    module.launch_from_torch = launch


def install() -> bool:
    if has_cuda():
        return False
    # Global, because the script calls torch.distributed.init_process_group through the module.
    dist.init_process_group = _with_gloo(dist.init_process_group)
    when_imported("colossalai.initialize", _launch_alone)
    announce(NAME, "gloo answers for nccl, which needs CUDA; a script started without torchrun is a world of one")
    return True
