"""Reading weights from the forms in which Open-Sora's users have them, without ever unpickling code; writing safetensors.

A file is taken whole and as it was written, or refused with its name: damaged, quantised and foreign files never pass for
weights. Which of a network's keys a host's files may lack is the host's knowledge (hosts/v1/weights.py).
"""

import json
import logging
import os
import re
import zipfile
from collections.abc import Mapping
from itertools import chain, zip_longest
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora_perflow.atomic import replacing

logger = logging.getLogger("opensora_perflow")

FORMS = (
    "an Open-Sora checkpoint folder (epochE-global_stepG, or the model/ folder in it), "
    "a .safetensors, .pt, .pth or .bin file, or a Hugging Face repository id (owner/name)"
)
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_RUN_FOLDER = re.compile(r"epoch\d+(-global_step\d+)?|\d{3,4}(-.*)?")  # as Open-Sora's train.py names them
_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin")
_NESTS = ("ema", "state_dict", "model", "module", "model_state_dict")  # ema first: v1.0.0 opensora/utils/ckpt_utils.py:62
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST_INDEX = 64 * 2**20  # bytes; a network of 10,000 tensors has 1 MB


def read_state_dict(source: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of a checkpoint, on the CPU, without the prefixes of DistributedDataParallel and torch.compile.

    Args:
        source: A path or repository id; see FORMS. A folder may hold its weights in shards with an index.json. In a folder a
            whole file comes before an index, and safetensors before .bin, as in Hugging Face's loaders. A string is a
            repository id only where nothing local suggests that a path is meant.

    Raises:
        ValueError: nothing is there, it is not one of FORMS, or it is damaged. The message names the file.
        OSError: the system refuses to read it.
    """
    refuse_missing(source)
    path = Path(source)
    if path.is_file():
        state = _read_chosen(path)
    else:
        state = _read_folder(path if path.is_dir() else _download(str(source)))
    return _unwrapped(state, source)


def refuse_missing(source: str | os.PathLike) -> None:
    """Raises ValueError where a source is no file, no folder and no repository id. Asks no hub."""
    path, text = Path(source), str(source)
    if not text.strip() or not (path.is_file() or path.is_dir() or _is_repo_id(text)):
        raise ValueError(f"no checkpoint at {text!r}; accepted: {FORMS}")


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The strings that a .safetensors file keeps beside its tensors.

    Raises:
        ValueError: it is damaged, or no safetensors file.
    """
    _check_beginning(Path(path))
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # see _load
        raise _damaged(path, error) from error


def write_state_dict(path: str | os.PathLike, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically: readers see the old file or the whole new one."""
    with replacing(path) as temporary:
        # Contiguous copies: safetensors refuses tensors that share memory.
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        save_file(tensors, temporary, dict(metadata or {}))


def misfits(state: Mapping[str, Tensor], network: nn.Module, name: str = "the network") -> str | None:
    """Why a state dict does not fit a network, in words: keys of each kind of mismatch; None where it fits.

    Keys and shapes must be the network's, and values of its parameters finite. (A buffer may hold NaN on purpose.)
    """
    expected, found = (_shapes(of) for of in (network.state_dict(), state))
    kinds = [
        [f"{key} is missing" for key in expected if key not in found],
        [f"{key} is not in {name}" for key in found if key not in expected],
        [f"{key} is {shape}, {name}'s is {expected[key]}" for key, shape in found.items() if expected.get(key, shape) != shape],
        [f"{key} holds NaN or infinity, from damage or a training that diverged" for key in _broken(state, network)],
    ]
    problems = [problem for problem in chain(*zip_longest(*kinds)) if problem is not None]
    if not problems:
        return None
    return "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")


def _shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in state.items()}


def _broken(state: Mapping[str, Tensor], network: nn.Module) -> list[str]:
    """Parameters of a network whose values in a state dict are not finite."""
    return [key for key, _ in network.named_parameters() if key in state and not torch.isfinite(state[key]).all()]


def _is_repo_id(source: str) -> bool:
    """Is a string that names nothing local meant for the Hugging Face Hub?"""
    if not _REPO_ID.fullmatch(source) or ".." in source:
        return False
    owner, name = source.split("/")
    written = _RUN_FOLDER.fullmatch(owner) or _RUN_FOLDER.fullmatch(name)
    return not (written or Path(owner).exists() or name.endswith((*_SUFFIXES, ".json")))


def _read_file(path: Path) -> dict[str, Tensor]:
    """Tensors of one file."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{str(path)!r} is not a checkpoint; accepted: {FORMS}")
    _check_beginning(path)
    state = _load(path)
    if path.suffix != ".safetensors":
        state = _unnested(state, path)
    _check_tensors(state, path)
    return state


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        _check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    # torch and safetensors raise a dozen types here, SafetensorError and RecursionError among them; all mean that the file
    # holds no plain tensors.
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: str | os.PathLike, error: Exception) -> ValueError:
    return ValueError(
        f"{str(path)!r} cannot be read as plain tensors ({type(error).__name__}: {' '.join(str(error).split())[:500]}); if it "
        "should hold weights, it is damaged or incomplete: fetch or save it again"
    )


def _check_sums(path: Path) -> None:
    """Raises where a file of torch.save is not what was written: torch.load does not compare the checksums that it holds."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its record {damaged!r} is wrong")


def _check_beginning(path: Path) -> None:
    """Raises ValueError where other things than weights bear the name of a file of weights."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{str(path)!r} is a git-lfs pointer, which stands for the real file; fetch that with `git lfs pull`")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{str(path)!r} is a web page, not weights; download the file itself")
    if not start:
        raise ValueError(f"{str(path)!r} is empty; fetch or save it again")


def _unnested(state: Any, path: Path) -> dict[str, Tensor]:
    """The tensors in what torch.save wrote, under one of _NESTS or bare."""
    for _ in range(len(_NESTS)):  # pickles may hold themselves
        if not isinstance(state, Mapping):
            break
        inner = next((key for key in _NESTS if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        logger.info("%s: reading the weights under %r of %s", path, inner, _shown(state))
        state = state[inner]
    if not isinstance(state, Mapping):
        raise ValueError(f"{str(path)!r} holds no state dict of tensors, but a {type(state).__name__}")
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise ValueError(
            f"{str(path)!r} holds no state dict of tensors: found the keys {_shown(state)}; weights are taken from the top or "
            f"from under {', '.join(_NESTS)}"
        )
    return dict(state)


def _shown(state: Mapping[Any, Any]) -> str:
    keys = [str(key)[:80] for key in state]
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def _check_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError unless these are weights: dense, floating point."""
    if not state:
        raise ValueError(f"{str(path)!r} holds no tensors")
    for key, value in state.items():
        if value.dtype not in _DTYPES:
            raise ValueError(
                f"{key} in {str(path)!r} is {value.dtype}: quantised or no weights. Weights are "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)}; name the original ones"
            )
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(f"{key} in {str(path)!r} holds no dense values ({value.layout}, {value.device}); save it dense")


def _unwrapped(state: Mapping[str, Tensor], source: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict of the network itself: torch.compile and wrappers of training write names of their own into the keys."""
    keys = {key: key for key in state}
    for wrapper in _WRAPPERS:
        keys = {key: name.replace(wrapper, "") for key, name in keys.items()}
    while all(name.startswith("module.") for name in keys.values()):
        keys = {key: name.removeprefix("module.") for key, name in keys.items()}
    if len(set(keys.values())) < len(keys):
        raise ValueError(f"{str(source)!r} holds tensors twice, with and without a wrapper's prefix: {_shown(state)}")
    return {name: state[key] for key, name in keys.items()}


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for place in (folder / "model", folder):
        if not place.is_dir():
            continue
        names = [name for whole in _WHOLE for name in (whole, f"{whole}.index.json") if (place / name).is_file()]
        if names:
            return _read_chosen(_chosen(place, names))
        others = sorted(path.name for path in place.iterdir() if path.name.endswith((*_SUFFIXES, ".index.json")))
        if others:
            raise ValueError(
                f"no weights in the folder {str(place)!r} that are taken unasked: it holds {', '.join(others[:8])}, of which "
                f"one may be meant: name the file; accepted: {FORMS}"
            )
    raise ValueError(f"no weights in the folder {str(folder)!r}; accepted: {FORMS}")


def _chosen(place: Path, names: list[str]) -> Path:
    """The first of the files that a folder has. Says which it is where that was a choice."""
    if ".bin" in names[0]:
        newer = sorted(path.name for path in place.glob("*.safetensors") if not _is_variant(path.name))
        if newer:
            raise ValueError(
                f"the folder {str(place)!r} holds {names[0]} beside {', '.join(newer[:5])}, and which of them are the "
                "weights is unclear; name the file, or remove what is old"
            )
    if len(names) > 1:
        logger.warning("%s: taking %s, not %s beside it", place, names[0], ", ".join(names[1:]))
    return place / names[0]


def _read_chosen(path: Path) -> dict[str, Tensor]:
    return _read_index(path) if path.name.endswith(".index.json") else _read_file(path)


def _is_variant(name: str) -> bool:
    """Is a file another precision of weights (model.fp16.safetensors), or an adapter's?"""
    return "adapter" in name or re.search(r"\.(fp16|bf16|fp32|fp8|int8|non_ema|ema)[.-]", name) is not None


def _read_index(index: Path) -> dict[str, Tensor]:
    """Tensors of the shards that an index names; exactly those that it names."""
    shards: dict[str, set[str]] = {}
    for key, shard in _weight_map(index).items():
        shards.setdefault(shard, set()).add(key)
    state: dict[str, Tensor] = {}
    for shard, keys in sorted(shards.items()):
        path = _shard(index, shard)
        tensors = _read_file(path)
        if keys != tensors.keys():
            different = sorted(keys ^ tensors.keys())
            raise ValueError(
                f"{str(index)!r} does not belong to {str(path)!r}: {', '.join(different[:5])} "
                f"{'are' if len(different) > 1 else 'is'} in one of them alone"
            )
        state.update(tensors)
    return state


def _weight_map(index: Path) -> dict[str, str]:
    """Key -> file, as an index says."""
    _check_beginning(index)
    if index.stat().st_size > _LARGEST_INDEX:
        raise ValueError(f"{str(index)!r} has {index.stat().st_size} bytes, which no index of weights needs")
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(index)!r} is not JSON ({type(error).__name__}: {error}); fetch or save it again") from error
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise ValueError(f'{str(index)!r} is not an index of weights: no "weight_map" from keys to files in it')
    return found


def _shard(index: Path, name: str) -> Path:
    """The file that an index names: beside it, of the index's own kind, and not somewhere else by a link.

    Hugging Face's cache keeps a snapshot as links into the blobs/ of the same repository.
    """
    suffix = ".safetensors" if ".safetensors" in index.name else ".bin"
    plain = not any(part in name for part in ("\0", "..")) and bool(name) and not PurePosixPath(name).is_absolute()
    if not plain or PureWindowsPath(name).drive or "\\" in name or not name.endswith(suffix):
        raise ValueError(f"{str(index)!r} names {name[:200]!r} as a shard, which is no {suffix} file in its folder")
    path, home = index.parent / name, index.parent.resolve()
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(path.resolve().is_relative_to(allowed) for allowed in homes):
        raise ValueError(f"{str(index)!r} names {name!r} as a shard, which is a link out of its folder to {path.resolve()}")
    if not path.is_file():
        raise ValueError(f"{str(path)!r}, which {index.name} names, is missing; fetch or save the checkpoint again")
    return path


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
            f"({type(error).__name__}: {' '.join(str(error).split())[:500]}); accepted: {FORMS}"
        ) from error
