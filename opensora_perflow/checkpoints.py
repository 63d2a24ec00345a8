"""Reading weights from the forms in which Open-Sora's users have them, without ever unpickling code; writing safetensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_perflow.atomic import replacing

FORMS = (
    "an Open-Sora checkpoint folder (epochE-global_stepG, or the model/ folder in it), "
    "a .safetensors, .pt, .pth or .bin file, or a Hugging Face repository id (owner/name)"
)
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHT_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")


def read_state_dict(source: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a checkpoint, on the CPU.

    Args:
        source: A path or repository id; see FORMS. A folder may hold its weights in shards with an index.json.

    Raises:
        ValueError: nothing is there, or it is not one of FORMS.
    """
    path = Path(source)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path)
    if _REPO_ID.fullmatch(str(source)) and not str(source).startswith("."):
        return _read_folder(_download(str(source)))
    raise ValueError(f"no checkpoint at {str(source)!r}; accepted: {FORMS}")


def write_state_dict(path: str | os.PathLike, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically: readers see the old file or the whole new one."""
    with replacing(path) as temporary:
        # Contiguous copies: safetensors refuses tensors that share memory.
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        save_file(tensors, temporary, dict(metadata or {}))


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(str(path))
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(f"{str(path)!r} is not a checkpoint; accepted: {FORMS}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several types here; all mean that the file holds no plain tensors
        raise ValueError(f"{str(path)!r} cannot be read as plain tensors ({type(error).__name__}: {error})") from error
    for key in ("ema", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{str(path)!r} holds no state dict of tensors")
    return dict(state)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for place in (folder / "model", folder):
        for index in sorted(place.glob("*.index.json")):
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {key: value for shard in shards for key, value in _read_file(place / shard).items()}
        for name in _WEIGHT_FILES:
            if (place / name).is_file():
                return _read_file(place / name)
    raise ValueError(f"no weights in the folder {str(folder)!r}; accepted: {FORMS}")


def _download(repo_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{repo_id!r} is no local path, and huggingface_hub, which would fetch it, is not installed; accepted: {FORMS}"
        ) from error
    try:
        return Path(snapshot_download(repo_id, allow_patterns=["*.safetensors", "*.bin", "*.json"]))
    except Exception as error:  # the hub's client raises its own, requests' and OS errors
        raise ValueError(
            f"{repo_id!r} is no local path and could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {error}); accepted: {FORMS}"
        ) from error
