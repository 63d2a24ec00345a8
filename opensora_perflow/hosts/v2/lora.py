"""Adapters as Open-Sora 2.0 keeps them: peft's own files, in a folder lora/ of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from opensora_perflow.checks import parse_json, read_bounded, shown
from opensora_perflow.hosts.v2.host import LATER
from opensora_perflow.training.adapters import DOWN, UP, merged

FOLDER = "lora"
CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
"""Before the names of all weights in such a file."""
SAVED = "guidance_in"
"""The module that mode range trains and saves whole."""


def lora_folder(source: str | os.PathLike) -> Path | None:
    """The folder of adapters that a path is, or that a checkpoint folder holds; None where there is none."""
    places = Path(source), Path(source) / FOLDER
    return next((place for place in places if (place / CONFIG).is_file() and weights_in(place) is not None), None)


def weights_in(folder: Path) -> Path | None:
    """The file of adapters in a folder."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def with_lora(base: Mapping[str, Tensor], state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """A network's weights with its adapters in them, computed in float32, in the base's dtype.

    Args:
        base: Under the network's own names.
        state: Of a file of adapters.
        folder: Where its adapter_config.json is.

    Raises:
        ValueError: the adapters are no plain LoRA, or belong to another network.
    """
    scale = _scale(folder / CONFIG)
    plain = {name.removeprefix(PREFIX): value for name, value in state.items()}
    added = {_ours(name): value for name, value in plain.items() if ".lora_" in name}
    strange = [name for name in added if not name.endswith((DOWN, UP)) or _partner(name) not in added]
    strange += [name for name in state if not name.startswith(PREFIX)]
    if strange or not added:
        raise ValueError(f"{folder} holds no adapters of linear layers alone: {', '.join(strange or plain)[:200]}")
    whole = {name: value for name, value in plain.items() if ".lora_" not in name}
    _check_whole(whole, base)
    return {**merged(base, added, scale), **whole}


def _check_whole(weights: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Raises ValueError for weights, saved whole beside adapters, that the base does not have so."""
    for name, value in weights.items():
        like = base.get(name, value if name.startswith(LATER) else None)
        if like is None or like.shape != value.shape:
            found = "nothing" if like is None else list(like.shape)
            raise ValueError(
                f"the adapters belong to another network: {name} is {list(value.shape)}, and the base has {found}; name the "
                "weights that their training started from"
            )


def peft_state(adapters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapters, and weights that are saved whole, under the names that peft's files have."""
    return {f"{PREFIX}{name.replace('.default.', '.')}": value for name, value in {**adapters, **saved}.items()}


def peft_config(rank: int, layers: Iterable[str], saved: bool) -> str:
    """The adapter_config.json of adapters of these layers, whose alpha is their rank; `saved`: with SAVED whole."""
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True, "r": rank,
        "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "target_modules": list(layers), "modules_to_save": [SAVED] if saved else None,
    }  # fmt: skip
    return json.dumps(config, indent=1) + "\n"


def _ours(name: str) -> str:
    return name.replace(".lora_A.weight", DOWN).replace(".lora_B.weight", UP)


def _partner(name: str) -> str:
    """The other factor of an adapter."""
    return name.removesuffix(DOWN) + UP if name.endswith(DOWN) else name.removesuffix(UP) + DOWN


def _scale(file: Path) -> float:
    try:
        config = parse_json(read_bounded(file))
        plain = config["peft_type"] == "LORA" and config.get("bias", "none") == "none"
        unknown = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(name)]
        scale = float(config["lora_alpha"]) / float(config["r"])
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{file} is no config of peft's LoRA ({type(error).__name__}: {error}); restore it") from error
    if unknown or not plain:
        named: dict[str, Any] = {name: config.get(name) for name in ("peft_type", "bias", *unknown)}
        raise ValueError(f"{file} is not of a plain LoRA, which alone can be merged: {shown(named)}")
    return scale
