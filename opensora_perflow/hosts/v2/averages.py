"""The average of the weights (EMA) under Open-Sora 2.0, as `ema.safetensors` in each checkpoint folder.

Three things keep Open-Sora 2.0 from having one. It copies the network in bfloat16, in which an average does not move
(scripts/diffusion/train.py:200). Without TensorNVMe it saves the first process's shard of the copy (utils/ckpt.py:449). And it
keeps none of adapters (train.py:199). The file is the one that its loader looks for first, and holds the whole in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_perflow.checkpoints import read_state_dict, write_state_dict
from opensora_perflow.hosts.masters import masters_of
from opensora_perflow.hosts.script import main_variable
from opensora_perflow.hosts.wrappers import unwrap
from opensora_perflow.training.adapters import is_added
from opensora_perflow.training.ema import Ema
from opensora_perflow.training.state import AVERAGES

FILE_NAME = AVERAGES[0]


def copy_in_float32(network: nn.Module) -> None:
    """Have the next deep copy of a network be a float32 one on the CPU: train.py makes its average of that."""

    def copied(memo: dict[int, Any]) -> nn.Module:
        del network.__deepcopy__
        for parameter in network.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", torch.float32, copy=True), requires_grad=False)
        return deepcopy(network, memo)

    network.__deepcopy__ = copied


class AdapterAverage:
    """The average of adapters while they are trained: this process's shards of it, moved after each step of the optimizer.

    Args:
        model: The script's network.
        optimizer: The script's.
        decay: See `training.ema.Ema`.
        resumed: The checkpoint folder that the adapters came from; None, or one without an average: it begins with the adapters
            as they are.
    """

    def __init__(self, model: nn.Module, optimizer: Any, decay: float, resumed: Path | None) -> None:
        self._model, self._optimizer = model, optimizer
        self.ema = Ema(self._shards(), decay)
        if resumed is not None and (resumed / FILE_NAME).is_file():
            found = read_state_dict(resumed / FILE_NAME)
            for name, average in self.ema.averages.items():
                average.copy_(_part(found[saved_name(name)], average))
        step = optimizer.step

        def stepping(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.ema.update(self._shards())
            return result

        optimizer.step = stepping

    def _shards(self) -> dict[str, Tensor]:
        """ZeRO's float32 masters of the adapters, or the adapters where there are none."""
        plain = {
            name: value for name, value in unwrap(self._model).named_parameters() if is_added(name) and value.requires_grad
        }
        return masters_of(self._model) or plain

    def whole(self) -> dict[str, Tensor] | None:
        shapes = {name: value.shape for name, value in unwrap(self._model).named_parameters() if name in self.ema.averages}
        return whole(self.ema.averages, shapes, saved_name)


def write_average(folder: Path, adapters: AdapterAverage | None) -> None:
    """Write the average into a checkpoint folder, atomically; nothing where the script keeps none, or writes it itself.

    Every process has to call this, and the first one writes.
    """
    copy = main_variable("ema")
    if (main_variable("cfg") or {}).get("async_io") or (copy is None and adapters is None):
        return
    if adapters is not None:
        state = adapters.whole()
    else:
        state = whole(dict(copy.named_parameters()), main_variable("ema_shape_dict"), str)
        if state is not None:
            state.update({name: value for name, value in copy.state_dict().items() if name not in state})  # buffers
    if state is not None:
        write_state_dict(folder / FILE_NAME, state)


def whole(
    shards: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], named: Callable[[str], str]
) -> dict[str, Tensor] | None:
    """Tensors that every process has a flat shard of, on the CPU of the first one; None in the others.

    Args:
        shards: Name -> shard, as ZeRO and Open-Sora split: flat, filled up with zeros to equal lengths. Whole tensors pass.
        shapes: Name -> shape of the whole.
        named: Name in the result.
    """
    state, first = {}, not dist.is_initialized() or dist.get_rank() == 0
    for name, shard in shards.items():
        shape, parts = shapes[name], [shard.detach()]
        if shard.numel() < shape.numel():
            parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, shard.detach())
        if first:
            state[named(name)] = torch.cat([part.flatten() for part in parts])[: shape.numel()].view(shape).cpu()
    return state if first else None


def _part(value: Tensor, shard: Tensor) -> Tensor:
    """This process's shard of a whole tensor, of the shape of another shard."""
    if value.shape == shard.shape:
        return value
    rank = dist.get_rank() if dist.is_initialized() else 0
    flat = value.flatten()[rank * shard.numel() : (rank + 1) * shard.numel()]
    return torch.nn.functional.pad(flat, [0, shard.numel() - flat.numel()])


def saved_name(name: str) -> str:
    """The name of an adapter's weight in a file that peft wrote."""
    return f"base_model.model.{name.replace('.modules_to_save.', '.').replace('.default.', '.')}"
