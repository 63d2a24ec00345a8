"""Open-Sora 2.0 as the host of a training run: `training.host.Host`, answered by what its scripts know."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.hosts import masters, saving, script
from opensora_perflow.hosts.host import OpenSoraScript
from opensora_perflow.hosts.optimizer import keep_state
from opensora_perflow.hosts.v2.averages import AdapterAverage, write_average
from opensora_perflow.hosts.wrappers import settle, unwrap
from opensora_perflow.training.adapters import adapters

ZERO_AT_FIRST = ("cond_in.weight", "cond_in.bias")
"""The embedder of reference frames, which older weights and those of Flux lack. Its first weights are zeros."""
LATER = ("guidance_in.", *ZERO_AT_FIRST)
"""What a network may have and a file of its weights not."""


class OpenSora2(OpenSoraScript):
    """A script of Open-Sora 2.0.

    Args:
        built: The teacher that was made where the student was built, or None.
    """

    first_weights = staticmethod(script.loaded_weights)

    def __init__(self, built: nn.Module | None = None) -> None:
        self.built = built
        self.followed: AdapterAverage | None = None

    def weights(self, source: str | os.PathLike, network: nn.Module) -> Mapping[str, Tensor]:
        return with_later(read_state_dict(source), network.state_dict())

    def own_teacher(self, model: nn.Module, source: str | None) -> nn.Module | None:
        if self.built is None:
            return model if source is None and adapters(model) else None
        # It was built before train.py said where the student checkpoints gradients. A copy can do so there too, and does not.
        modules = dict(self.built.named_modules())
        for name, module in unwrap(model).named_modules():
            if hasattr(module, "grad_checkpointing") and name in modules:
                modules[name].grad_checkpointing = False
        return self.built

    def resumed(self) -> tuple[str, bool] | None:
        config = script.running_config() or {}
        folder = config.get("load") or (config.get("lora_checkpoint") if config.get("lora_config") else None)
        return None if folder is None else (str(folder), True)

    def restore(self, model: nn.Module) -> str:
        folder, _ = self.resumed()
        return masters.restore_masters(_checkpoint(folder), model)

    def before_each_save(self, write: Callable[[Path], None]) -> None:
        saving.before_each_save(write, lambda folder: write_average(folder, self.followed))

    def follow(self, model: nn.Module) -> None:
        """Keep an average of the adapters that the running script trains, where its config has ema_decay."""
        config, optimizer = script.running_config() or {}, script.main_variable("optimizer")
        if config.get("lora_config") and config.get("ema_decay") is not None and optimizer is not None:
            resumed = self.resumed()
            folder = None if resumed is None else _checkpoint(resumed[0])
            self.followed = AdapterAverage(model, optimizer, config["ema_decay"], folder)

    def keep_state(self) -> Callable[[], None]:
        return keep_state([] if self.followed is None else self.followed.ema.averages.values())

    def settled(self, model: nn.Module) -> nn.Module:
        boosted = script.main_variable("model")
        if isinstance(boosted, nn.Module):
            settle(boosted)
        return model


def with_later(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with zeros for what another one of the same network has and older files have not, see LATER."""
    later = {name: value for name, value in like.items() if name not in state and name.startswith(LATER)}
    return {**state, **{name: torch.zeros_like(value, device="cpu") for name, value in later.items()}}


def _checkpoint(folder: str) -> Path:
    """The checkpoint that a folder is, or that its folder lora/ is in."""
    path = Path(folder)
    return path.parent if path.name == "lora" else path
