"""Adapters of peft (LoRA) in a network: the network without them, its own weights, and how both become one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain

from torch import Tensor, nn

ADDED = (".lora_", ".modules_to_save.")
"""In the names of weights that peft adds to a network's own."""
WRAPPED = (".base_layer.", ".original_module.")
"""What peft puts into the names of a network's own weights."""
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""After a layer's name: the factors [rank, in] and [out, rank] of what its adapter adds to its weight."""


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


def teacher_call(teacher: nn.Module, student: nn.Module) -> Callable[..., Tensor]:
    """What is called where a teacher answers: the teacher itself, unless it is the student's own network.

    That network answers without its adapters and as a frozen copy of it would: in eval mode, and nothing of it compiled.
    """
    if teacher is not student:
        return teacher

    def call(*inputs: object, **named: object) -> Tensor:
        with as_teacher(student):
            return student(*inputs, **named)

    return call


@contextmanager
def as_teacher(network: nn.Module) -> Iterator[None]:
    """The student's own network as `teacher_call` asks it; also while a backward repeats its forward."""
    with adapters_off(network), _as_copied(network):
        yield


@contextmanager
def _as_copied(network: nn.Module) -> Iterator[None]:
    """A network in eval mode, with what torch.compile has wrapped bare: compiled code need not see adapters going off."""
    with ExitStack() as undo:
        for module in list(network.modules()):
            if module.training:
                undo.callback(setattr, module, "training", True)
                module.training = False
            for name, child in list(module._modules.items()):
                bare = None if child is None else child._modules.get("_orig_mod")
                if bare is not None:
                    undo.callback(module._modules.__setitem__, name, child)
                    module._modules[name] = bare
            if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
                undo.callback(setattr, module, "forward", vars(module).pop("forward"))
            if getattr(module, "_compiled_call_impl", None) is not None:
                undo.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
                module._compiled_call_impl = None
        yield


def base_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters, under the names that it has without peft."""
    return {_plain_name(name): value for name, value in named_tensors(network) if not is_added(name)}


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapters' part of the state dict."""
    return {name: value for name, value in named_tensors(network) if is_added(name)}


def adapted_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights that adapters add to, as they are without, under the names that they have without peft."""
    names = {f"{name.removesuffix(DOWN)}.weight" for name in adapter_state(network) if name.endswith(DOWN)}
    return {name: value for name, value in base_state(network).items() if name in names}


def named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state dict holds, past any hooks that change state dicts."""
    for prefix, module in network.named_modules(remove_duplicate=False):
        buffers = ((name, value) for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set)
        for name, value in chain(module._parameters.items(), buffers):
            if value is not None:
                yield f"{prefix}.{name}" if prefix else name, value


def is_added(name: str) -> bool:
    """Is this the name of a weight that peft added?"""
    return any(part in f".{name}" for part in ADDED)


def merged(base: Mapping[str, Tensor], added: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A network's weights with its adapters in them: W + scale B A, computed in float32, in W's dtype.

    Args:
        base: The network's own, under the names that it has without peft.
        added: A [rank, in] and B [out, rank] of each adapted layer.
        scale: alpha / rank.

    Raises:
        ValueError: an adapter for a layer that the base does not have, or has in another shape.
    """
    state = dict(base)
    for name, down in added.items():
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            weight, up = state.get(f"{layer}.weight"), added[f"{layer}{UP}"]
            shape = [len(up), down.shape[1]]
            if weight is None or list(weight.shape) != shape:
                found = "nothing" if weight is None else list(weight.shape)
                raise ValueError(
                    f"the adapters belong to another network: {layer}.weight should be {shape}, and the base has {found}; name "
                    "the weights that their training started from"
                )
            state[f"{layer}.weight"] = (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)
    return state


def remove_adapters(network: nn.Module) -> None:
    """Put the original layers back where peft has wrapped them."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            original = _original(child)
            if original is not None:
                setattr(module, name, original)


def _plain_name(name: str) -> str:
    dotted = f".{name}"
    for part in WRAPPED:
        dotted = dotted.replace(part, ".")
    return dotted[1:]


def _original(module: nn.Module) -> nn.Module | None:
    return module._modules.get("base_layer", module._modules.get("original_module"))
