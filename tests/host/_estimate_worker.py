"""Prints what the estimator counts of a small STDiT3 on meta, and what the same network takes on a CPU.

argv: ROOT, full or lora.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

root, kind, benchmarks = Path(sys.argv[1]), sys.argv[2], Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(root), str(benchmarks)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from memory import measure, stdit3  # noqa: E402
from recipes import OURS  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from opensora_perflow import portable  # noqa: E402
from opensora_perflow.hosts import meta  # noqa: E402
from opensora_perflow.hosts.v1.lora import LoRA, add_adapters  # noqa: E402
from opensora_perflow.portable.xformers_attention import memory_efficient_attention  # noqa: E402
from opensora_perflow.tools.activations import cost  # noqa: E402
from opensora_perflow.tools.residents import residents  # noqa: E402

portable.activate()
LORA = LoRA(16) if kind == "lora" else None
SIZES = dict(depth=8, class_dropout_prob=0.0, enable_flash_attn=True, model_max_length=60)
TOLD = dict(height=192.0, width=192.0, fps=24.0)


def network(device: str) -> torch.nn.Module:
    with meta.unloaded() if device == "meta" else torch.device("cpu"):
        built = stdit3(root, **SIZES)
        if LORA is not None:
            add_adapters(built, LORA)
    return built.to(torch.bfloat16).train()


def arguments(device: str) -> tuple:
    given = dict(device=device, dtype=torch.bfloat16)
    x, y = torch.zeros(2, 4, 5, 24, 24, **given), torch.zeros(2, 1, 60, 64, **given)
    told = {name: torch.full((2,), value, device=device) for name, value in TOLD.items()}
    return (x, torch.zeros(2, device=device), y), told


class Made(TorchDispatchMode):
    """Notes the memory of every tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return made

    def alive(self) -> int:
        return sum(size for reference, size in self.found.values() if not reference.expired())


def allocated(built: torch.nn.Module) -> int:
    """Bytes that a forward leaves allocated on a CPU, without its output; weights and inputs were there before."""
    args, told = arguments("cpu")
    known = {tensor.untyped_storage()._cdata for tensor in meta.tensors_of(built)}
    with Made() as made:
        output = built(*args, **told)
    gc.collect()
    made.found = {key: value for key, value in made.found.items() if key not in known}
    return made.alive() - output.nbytes


def flash(q, k, v, **kwargs):
    return memory_efficient_attention(q, k, v)


portable.imports.provide_modules(__name__, {"flash_attn": {"flash_attn_func": flash}})
real = network("cpu")
found = {"measured": {"kept": allocated(real)}}
for module in real.modules():
    module.grad_checkpointing = True
found["measured"]["checkpointed"] = allocated(real)
small = stdit3(root)
with torch.no_grad():  # its caches too
    small(torch.zeros(2, 4, 5, 16, 16), torch.zeros(2), torch.zeros(2, 1, 20, 64), **{k: torch.full((2,), 128.0) for k in TOLD})
found["resident"] = measure(small, LORA, OURS)
trained = [parameter for parameter in small.parameters() if parameter.requires_grad]
found["steps"] = 4 * sum(parameter.grad is not None for parameter in trained)  # torch's Adam counts steps in a tensor
found["idle"] = sum(parameter.nbytes for parameter in trained if parameter.grad is None)  # 1.3's embedders of reference frames
found["counted"] = residents(small, 1, copied_teacher=LORA is None, adapters=LORA is not None)

fused = F.scaled_dot_product_attention
meta.prepare()
sys.modules.pop("opensora.models.layers.blocks")
for name in [name for name in sys.modules if name.startswith("opensora.models")]:
    del sys.modules[name]
from opensora.registry import MODELS  # noqa: E402

MODELS.module_dict.clear()
bare = network("meta")
args, told = arguments("meta")
with meta.numbers_read_as(192.0):
    found["estimated"] = vars(cost(bare, lambda: bare(*args, **told)))
print("RESULT", json.dumps(found))
