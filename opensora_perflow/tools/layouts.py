"""Weights as files that Open-Sora's loaders take, with their perflow.json: as a whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from opensora_perflow.atomic import replacing
from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.v2 import lora
from opensora_perflow.tools.outputs import new_folder
from opensora_perflow.training.state import FILE_NAME, METADATA_KEY, StudentState, find_state, write_state

FILES = (".pt", ".pth", ".safetensors")
LAYOUTS = (
    "a folder (OUT/model/model.safetensors: Open-Sora 1.0 to 2.0), a .pt or .pth file (1.0 to 2.0) or a .safetensors file "
    "(1.3, 2.0 and this package)"
)


def check_free(out: Path, state: StudentState | None = None) -> None:
    """Raises ValueError where weights cannot be written to OUT.

    OUT exists or is below a file. Or it is a file whose perflow.json would be another student's, or pass for other weights'.
    """
    refuse_taken(out)
    if out.suffix == ".bin":
        raise ValueError(f"OUT is a folder or a file that ends in {', '.join(FILES)}, got {str(out)!r}; name one of those")
    if out.suffix not in FILES:
        return
    there = find_state(out.parent)
    if there is not None and there[0] != state:
        raise ValueError(f"{there[1]} belongs to other weights; name an OUT in another folder")
    others = sorted(path.name for path in out.parent.glob("*") if path.suffix in (*FILES, ".bin"))
    if there is None and state is not None and others:
        raise ValueError(
            f"{out} would lie beside {', '.join(others[:3])}, and its {FILE_NAME} would pass for theirs; name an OUT in a "
            "folder of its own"
        )


def refuse_taken(out: Path) -> None:
    """Raises ValueError where OUT exists, or what should be its folder is a file."""
    if os.path.lexists(out):
        raise ValueError(f"{out} exists; name a file or folder that does not")
    file = next((place for place in out.parents if place.exists() and not place.is_dir()), None)
    if file is not None:
        raise ValueError(f"{out} cannot be written, since {file} is a file; name an OUT in a folder")


def write_weights(out: Path, weights: Mapping[str, Tensor], state: StudentState | None) -> None:
    """Write weights and what is known of them, in the layout that the suffix of OUT names, see LAYOUTS.

    Raises:
        ValueError: see `check_free`. OSError: OUT cannot be written.
    """
    check_free(out, state)
    if out.suffix not in FILES:
        with new_folder(out) as folder:
            (folder / "model").mkdir()
            write_state_dict(folder / "model" / "model.safetensors", weights, metadata_of(state))
            if state is not None:
                write_state(folder, state)
        return
    if state is not None:  # first: weights without it would be sampled with any windows
        out.parent.mkdir(parents=True, exist_ok=True)
        write_state(out.parent, state)
    if out.suffix == ".safetensors":
        write_state_dict(out, weights, metadata_of(state))
        return
    with replacing(out) as temporary:
        torch.save({name: value.clone() for name, value in weights.items()}, temporary)


def write_lora(out: Path, weights: Mapping[str, Tensor], config: str, state: StudentState | None) -> None:
    """Write OUT/lora and OUT/perflow.json, which Open-Sora 2.0 and peft load. OUT appears as a whole, or not at all.

    Args:
        weights: Under peft's names. config: The text of adapter_config.json.

    Raises:
        ValueError: see `check_free`. OSError: OUT cannot be written.
    """
    check_free(out)
    with new_folder(out) as folder:
        (folder / lora.FOLDER).mkdir()
        write_state_dict(folder / lora.FOLDER / lora.FILES[0], weights, metadata_of(state))
        (folder / lora.FOLDER / lora.CONFIG).write_text(config)
        if state is not None:
            write_state(folder, state)


def metadata_of(state: StudentState | None) -> dict[str, str]:
    """Of a .safetensors file."""
    return {"format": "pt"} if state is None else {"format": "pt", METADATA_KEY: state.to_json()}
