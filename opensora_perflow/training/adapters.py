"""Adapters of peft (LoRA) in a network: the network without them, and its weights under its own names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

ADDED = (".lora_", ".modules_to_save.")
"""In the names of weights that peft adds to a network's own."""
WRAPPED = (".base_layer.", ".original_module.")
"""What peft puts into the names of a network's own weights."""


def adapters(network: nn.Module) -> list[nn.Module]:
    """The layers of a network that peft has wrapped."""
    return [module for module in network.modules() if hasattr(module, "_disable_adapters") and _original(module) is not None]


@contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """The network as it was before it got adapters. Which parameters need gradients stays as it is."""
    layers = [module for module in adapters(network) if not module._disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def base_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters, under the names that it has without peft."""
    state = {}
    for name, value in network.state_dict().items():
        dotted = f".{name}"
        if not any(part in dotted for part in ADDED):
            for part in WRAPPED:
                dotted = dotted.replace(part, ".")
            state[dotted[1:]] = value
    return state


def remove_adapters(network: nn.Module) -> None:
    """Put the original layers back where peft has wrapped them."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            original = _original(child)
            if original is not None:
                setattr(module, name, original)


def _original(module: nn.Module) -> nn.Module | None:
    return module._modules.get("base_layer", module._modules.get("original_module"))
