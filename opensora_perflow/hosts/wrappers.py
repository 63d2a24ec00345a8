"""What is inside the wrappers of boosters, compilers and peft, whichever host's network it is."""

import sys
from collections.abc import Iterator

import torch
from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside any nesting of wrappers; a bare network is returned as it is.

    Known are torch.compile's OptimizedModule, the boosters' wrappers, DistributedDataParallel and peft's PeftModel. The
    network in a PeftModel keeps its adapters. Only calls go through wrappers; whatever is read or set is the network's.
    """
    *_, network = _layers(model)
    return network


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """A model, and what is inside each of its wrappers, outermost first."""
    yield model
    while (inside := _inside(model)) is not None:
        model = inside
        yield model


def _inside(model: nn.Module) -> nn.Module | None:
    # Children, not attributes: transformers' networks have an attribute `base_model`, which is the network itself.
    children = getattr(model, "_modules", {})
    adapted = getattr(children.get("base_model"), "_modules", {})  # a PeftModel holds a LoraModel, which holds the network
    candidates = (children.get("_orig_mod"), getattr(model, "module", None), adapted.get("model"))
    return next((inside for inside in candidates if isinstance(inside, nn.Module)), None)


def weights_dtype(network: nn.Module) -> torch.dtype:
    """The precision of a network's weights; float32 where it has none."""
    return next((parameter.dtype for parameter in network.parameters()), torch.float32)


def settle(model: nn.Module) -> None:
    """Wait until the weights of a wrapped model are complete.

    v1.3 boosts with overlap_allgather: after an optimizer step the weights arrive while the next forward runs, and only the
    wrapper's own forward waits for them. Reading them earlier gives stale shards on a GPU.
    """
    waits = (getattr(layer, "_force_wait_all_gather", None) for layer in _layers(model))
    wait = next((wait for wait in waits if wait is not None), None)
    if wait is not None:
        wait()


def compiler_is_loaded() -> bool:
    """May something be compiled in this process? Asked without loading torch's compiler, which takes seconds."""
    return "torch._dynamo" in sys.modules


def forget_compiled() -> None:
    """Have torch compile anew, at their next calls, all functions that it has compiled.

    Compiled code does not see hooks that came later; torch 2.2's does not see changed attributes of modules either.
    """
    if compiler_is_loaded():
        torch.compiler.reset()
