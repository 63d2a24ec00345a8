"""`perflow_lora`: adapters (LoRA) on any of the host's networks. The network without them is the teacher, so one copy is held.

    model = dict(type="perflow_lora", base=dict(type="STDiT3-XL/2", from_pretrained="hpcai-tech/OpenSora-STDiT-v3"), rank=16)

The network stays of its own class, with peft's layers in place of some linear ones. Two things change for Open-Sora's
train.py. The network's state dict is that of the adapters, so that checkpoints hold them alone and load into them. And a deep
copy, which train.py makes for its EMA in float32, holds copies of the adapters and nothing else.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from mmengine.registry import Registry
from torch import Tensor, nn

from opensora_perflow.checks import check_keys, key, listed, number, optional, shown, whole, words
from opensora_perflow.hosts.v1.weights import read_source
from opensora_perflow.training.adapters import adapted_state, adapter_state, is_added, named_tensors
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.state import StudentState, find_state
from opensora_perflow.training.teacher import digest

NAME = "perflow_lora"
EXAMPLE = 'model = dict(type="perflow_lora", base=dict(type="STDiT3-XL/2", from_pretrained=..., ...), rank=16)'
KEYS = ("rank", "alpha", "targets")
SCALE_INPUT = "t_embedder.mlp.0"
"""The layer that learns a guidance scale, see scale_input.py."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""A training may have rounded its base to any of these."""


@dataclass(frozen=True)
class LoRA:
    """What is added to a network.

    rank: Of each adapter, >= 1. alpha: What an adapter adds is multiplied by alpha / rank, > 0; None: rank.
    targets: Names of linear layers, or the ends of names after a dot; None: all linear layers. Those of the blocks alone are a
    third worse, see benchmarks/lora.py.

    Raises:
        ValueError: other values.
    """

    rank: int = key(16, whole())
    alpha: float | None = key(None, optional(number(above=0)))
    targets: Sequence[str] | None = key(
        None, optional(listed(words, "a list of names of linear layers", '["attn.qkv", "mlp.fc1"]'))
    )

    def __post_init__(self) -> None:
        check_keys(self, "model.")
        if self.alpha is None:
            object.__setattr__(self, "alpha", self.rank)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def layers(self, network: nn.Module) -> list[str]:
        """Names of the linear layers that get an adapter.

        Raises:
            ValueError: a target that is no linear layer's name; no targets, or a network without linear layers.
        """
        linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        if not linear or self.targets == ():
            raise ValueError(f"{type(network).__name__} has no linear layers to adapt; name some in model.targets")
        if self.targets is None:
            return linear
        ends = tuple(f".{target}" for target in self.targets)
        unknown = [end[1:] for end in ends if not any(f".{name}".endswith(end) for name in linear)]
        if unknown:
            known = sorted({re.sub(r"\.\d+(?=\.)", "", name) for name in linear})
            raise ValueError(
                f"model.targets names {', '.join(map(shown, unknown))}, and no linear layer of {type(network).__name__} "
                f"ends so; its linear layers, without the numbers of blocks: {', '.join(known[:30])}"
            )
        return [name for name in linear if f".{name}".endswith(ends)]


def perflow_lora(
    base: Mapping[str, Any] | None = None, from_pretrained: str | os.PathLike | None = None, **settings: Any
) -> nn.Module:
    """A network of the host with adapters, which alone are trained.

    Args:
        base: The network's own config, see MODELS.
        from_pretrained: Weights of the base, in place of base's own from_pretrained, or a checkpoint of adapters (--ckpt-path).
        settings: rank, alpha and targets, see `LoRA`; where adapters are loaded and these are left out, as they were trained.
            All else goes to the base: train.py sends input_size, in_channels, caption_channels, ...

    Raises:
        ValueError: values that LoRA refuses, a base without weights, or adapters of another base.
        ImportError: peft is missing.
    """
    from opensora.registry import MODELS

    found = None if from_pretrained is None else find_state(from_pretrained)
    loaded = found is not None and found[0].adapters is not None
    lora, settings = _split(settings, found[0].adapters if loaded else {})
    base = check_base(base)
    weights = from_pretrained if from_pretrained is not None and not loaded else base.get("from_pretrained")
    if weights is None:
        raise ValueError(
            "adapters need a base with weights, which their checkpoints do not hold; name them in "
            f"model.base.from_pretrained{'' if loaded else ' or with --ckpt-path'}: {EXAMPLE}"
        )
    network = MODELS.build({**base, **settings, "from_pretrained": weights})
    add_adapters(network, lora)
    if loaded:
        check_origin(found[0], adapted_state(network), str(from_pretrained), str(weights))
        network.load_state_dict(read_source(from_pretrained))
    return network


def check_base(base: Any) -> dict[str, Any]:
    """model.base as a dict. Raises ValueError where it is none with a type."""
    if not isinstance(base, Mapping) or "type" not in base:
        raise ValueError(f"model.base must be the config of a network, with its type, got {shown(base)}; write {EXAMPLE}")
    return dict(base)


def is_meant(config: Mapping[str, Any]) -> bool:
    """Does a script's config ask for adapters?"""
    return (config.get("model") or {}).get("type") == NAME


def check_config(config: Mapping[str, Any], recipe: Recipe) -> bool:
    """`is_meant`, after a look at what a script's config says of adapters.

    Raises:
        ValueError: wrong keys, a teacher beside the base, adapters where a whole network is expected, or the reverse.
    """
    model, meant = config.get("model") or {}, is_meant(config)
    if meant:
        check_base(model.get("base"))
        _split({name: value for name, value in model.items() if name not in ("type", "base", "from_pretrained")}, {})
        check_teacher_settings(recipe)
    for option, weights in {"--load": config.get("load"), "--ckpt-path": model.get("from_pretrained")}.items():
        found = None if weights is None else find_state(weights)
        if found is None:
            continue
        if found[0].adapters is not None and not meant:
            raise ValueError(
                f"{option} {str(weights)!r} holds adapters (LoRA) alone, and the config's model is a whole network; use the "
                f'config that trained them, with model=dict(type="{NAME}", base=...), or merge them into their base: '
                "opensora-perflow merge CHECKPOINT OUT --base WEIGHTS"
            )
        if found[0].adapters is None and meant and option == "--load":
            raise ValueError(
                f"--load {str(weights)!r} holds a whole network, and the config's model has adapters: a training of adapters "
                "goes on from a checkpoint of adapters; to begin one from these weights, use --ckpt-path"
            )
    return meant


def _split(settings: Mapping[str, Any], recorded: Mapping[str, Any]) -> tuple[LoRA, dict[str, Any]]:
    """LoRA's settings, where left out as recorded with adapters, and the others."""
    for name in settings:
        close = [] if name in KEYS else difflib.get_close_matches(name, KEYS)
        if close:  # networks take any key
            raise ValueError(f"unknown key {name} of model=dict(type={NAME!r}); did you mean {close[0]}?")
    own = {name: settings[name] for name in KEYS if settings.get(name) is not None}
    trained = {name: recorded[name] for name in KEYS if name in recorded}
    lora = LoRA(**{**trained, **own})
    if trained and lora != LoRA(**trained):
        raise ValueError(f"the adapters were trained as {LoRA(**trained)}, and the config says {lora}; leave out what differs")
    return lora, {name: value for name, value in settings.items() if name not in KEYS}


def add_adapters(network: nn.Module, lora: LoRA) -> nn.Module:
    """Give a network adapters that add nothing yet, freeze all else, and have copies and state dicts hold adapters alone.

    Raises:
        ValueError: see `LoRA.layers`. ImportError: peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            f"model=dict(type={NAME!r}) needs peft, which could not be imported ({error}); install it: pip install peft"
        ) from error
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.layers(network), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # the same in all processes: ZeRO does not compare them
        inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(is_added(name))
    network.perflow_lora = lora
    network.__deepcopy__ = lambda memo: adapters_alone(network)
    network._register_state_dict_hook(_leave_adapters)
    network._register_load_state_dict_pre_hook(_complete, with_module=True)
    return network


def lora_of(network: nn.Module) -> LoRA | None:
    """What `add_adapters` added; None for other networks."""
    return getattr(network, NAME, None)


def record_of(network: nn.Module) -> dict[str, Any] | None:
    """What StudentState keeps of a network's adapters; None where it has none."""
    lora = lora_of(network)
    return None if lora is None else {**asdict(lora), "base": digest(adapted_state(network))}


def check_origin(state: StudentState, adapted: Mapping[str, Tensor], source: str, base: str) -> None:
    """Raises ValueError where adapters were trained on other weights than these.

    Args:
        state: What lies beside the adapters.
        adapted: The weights of the layers that they belong to.
        source, base: Of adapters and weights, in words.
    """
    trained = state.adapters.get("base")
    if all(digest({name: value.to(dtype) for name, value in adapted.items()}) != trained for dtype in DTYPES):
        raise ValueError(
            f"the adapters in {source!r} were trained on another base than {base!r}; name the weights that their training "
            f"started from ({state.teacher_source})"
        )


def check_recipe(recipe: Recipe, network: nn.Module, reentrant: bool = False) -> None:
    """Raises ValueError where a recipe asks for what a network with adapters cannot do; other networks pass.

    `reentrant`: The host checkpoints gradients re-entrantly, and would find none behind a frozen first layer.
    """
    if lora_of(network) is None:
        return
    check_teacher_settings(recipe)
    if reentrant and getattr(network, "grad_checkpointing", False):
        raise ValueError(
            f"Open-Sora 1.0 and 1.1 cannot train model=dict(type={NAME!r}) with grad_checkpoint=True; write "
            "grad_checkpoint=False"
        )
    layer = network.get_submodule(SCALE_INPUT) if recipe.guidance.mode == "range" else None
    if layer is not None and not any(parameter.requires_grad for parameter in layer.parameters()):
        raise ValueError(
            f'guidance=dict(mode="range") is learned by {SCALE_INPUT}, which has no adapter; name it in model.targets, '
            'or use guidance=dict(mode="fixed", scale=...)'
        )


def check_teacher_settings(recipe: Recipe) -> None:
    """Raises ValueError where a recipe names a teacher of its own."""
    if recipe.teacher.from_pretrained is not None:
        raise ValueError(
            f"teacher.from_pretrained={recipe.teacher.from_pretrained!r} and model=dict(type={NAME!r}) exclude each other: "
            "the teacher of adapters is their base; leave teacher.from_pretrained out, and name the weights in "
            "model.base.from_pretrained or with --ckpt-path"
        )


def adapters_alone(network: nn.Module) -> nn.Module:
    """Modules that compute nothing and hold copies of a network's adapters under the names that they have there."""
    root = nn.Module()
    for name, value in adapter_state(network).items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        copy = value.detach().as_subclass(Tensor).clone()
        module.register_parameter(last, nn.Parameter(copy, requires_grad=value.requires_grad))
    return root


def _leave_adapters(network: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Hook of `state_dict`: takes all but the adapters out again."""
    for name, _value in named_tensors(network):
        if not is_added(name):
            state.pop(prefix + name, None)


def _complete(network: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Hook of `load_state_dict`: the weights that a checkpoint of adapters lacks are those that the network has.

    Open-Sora's loaders pass over what does not fit, so it is refused here.
    """
    own = adapter_state(network)
    given = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    wrong = [name for name, value in given.items() if name not in own or value.shape != own[name].shape]
    if wrong:
        others = "a whole network, or other adapters" if any(not is_added(name) for name in wrong) else "other adapters"
        raise ValueError(
            f"the checkpoint holds {others} than this network's ({type(network).__name__} with {lora_of(network)}): "
            f"{', '.join(wrong[:3])}{' ...' * (len(wrong) > 3)}; --load takes what the same model section wrote, and the "
            "weights of a whole network are named in model.base.from_pretrained or with --ckpt-path"
        )
    state.update({prefix + name: value for name, value in named_tensors(network) if not is_added(name)})


def register(models: Registry) -> None:
    """Enter the factory in the host's MODELS, once."""
    if NAME not in models.module_dict:
        models.register_module(name=NAME, module=perflow_lora)
