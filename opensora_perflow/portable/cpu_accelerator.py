"""ColossalAI's CPU accelerator with streams that do nothing, so that its ZeRO optimizer can ask for them.

The accelerator of 0.4.6 raises for Stream, current_stream, stream and synchronize (accelerator/cpu_accelerator.py), and
zero/low_level/low_level_optim.py:326-330 and bookkeeping/bucket_store.py:22 call them without looking. Linear layers
of tensor parallelism (shardformer/layer/utils.py:158) read a generator's state, where the accelerator of 0.4.6 and 0.5.0 hands
torch an argument that torch does not take, and seed the generator, where it raises. The loss scaler of float16 asks for a count
of devices and drops the answer (amp/naive_amp/grad_scaler/dynamic_grad_scaler.py:41), where it raises as well.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from opensora_perflow.portable.imports import announce, has_cuda, is_installed, when_imported

NAME = "cpu_accelerator"


class NoStream:
    """Stands for the one order in which a CPU does its work; there is nothing to wait for."""

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


def _with_streams(base: type) -> type:
    class StreamingCpuAccelerator(base):
        def Stream(self, device: Any = None, priority: int = 0, **kwargs: Any) -> NoStream:
            return NoStream()

        def current_stream(self, device: Any = None) -> NoStream:
            return NoStream()

        def default_stream(self, device: Any = None) -> NoStream:
            return NoStream()

        def stream(self, stream_: Any) -> AbstractContextManager[None]:
            return nullcontext()

        def synchronize(self, device: Any = None) -> None:
            return None

        def device_count(self) -> int:
            return 1

        def get_rng_state(self, device: Any = None) -> Tensor:
            return torch.get_rng_state()

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

    return StreamingCpuAccelerator


def _replace(module: ModuleType) -> None:
    current = module.get_accelerator()
    if current.name == "cpu":  # an NPU machine has no CUDA either, and needs nothing
        module.set_accelerator(_with_streams(type(current))())


def install() -> bool:
    if has_cuda() or not is_installed("colossalai"):
        return False
    when_imported("colossalai.accelerator", _replace)
    announce(NAME, "ColossalAI's CPU accelerator has streams that do nothing, because ZeRO asks for streams everywhere")
    return True
