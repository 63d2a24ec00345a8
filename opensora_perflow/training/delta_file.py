"""A delta's file: safetensors, with windows and origin in its metadata, and a checksum over all of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from opensora_perflow import __version__
from opensora_perflow.checkpoints import read_metadata, read_state_dict, write_state_dict
from opensora_perflow.checks import check_keys, choice, key, optional, parse_json, shown, words
from opensora_perflow.training.delta import CHANGE
from opensora_perflow.training.state import StudentState

METADATA_KEY = "perflow_delta"
"""Not that of a student: a delta is no network."""
FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _state(name: str, value: Any) -> str:
    StudentState.from_json(words(name, value), name)
    return value


@dataclass(frozen=True)
class Origin:
    """Where a delta came from. Raises ValueError for values of another kind."""

    base: str = key("", words)
    """teacher.digest of the base's weights that change, in float32."""
    base_source: str = key("", words)
    student_source: str = key("", words)
    """Both in words."""
    dtype: str = key("float32", choice(*DTYPES))
    """The student's."""
    state: str | None = key(None, optional(_state))
    """The student's state as JSON: its windows, guidance and so on; None where nothing was known."""
    version: str = key(__version__, words)

    def __post_init__(self) -> None:
        check_keys(self)

    @property
    def student(self) -> StudentState | None:
        return None if self.state is None else StudentState.from_json(self.state, "the delta's state")


def write_delta(path: str | os.PathLike, delta: Mapping[str, Tensor], origin: Origin) -> None:
    """Write a delta, see delta.difference, atomically."""
    record = {"format": FORMAT, **asdict(origin)}
    text = json.dumps({**record, "sha256": _checksum(delta, record)})
    write_state_dict(path, delta, {"format": "pt", METADATA_KEY: text})


def read_delta(path: str | os.PathLike) -> tuple[Origin, dict[str, Tensor]]:
    """A delta and where it came from.

    Raises:
        ValueError: there is no such file, it is no delta, or it is not as it was written.
    """
    text = read_metadata(path).get(METADATA_KEY) if str(path).endswith(".safetensors") and os.path.isfile(path) else None
    if text is None:
        raise ValueError(
            f"{str(path)!r} is no delta, which is a .safetensors file that `opensora-perflow delta make` wrote; make one of a "
            "student and its base first, and name it before any weights"
        )
    delta = read_state_dict(path)
    try:
        record = parse_json(text)
        checksum, found = record.pop("sha256"), record.get("format")
        whole = found != FORMAT or checksum == _checksum(delta, record)
        origin = Origin(**{name: value for name, value in record.items() if name != "format"}) if found == FORMAT else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the metadata of {str(path)!r} are not those of a delta ({type(error).__name__}: {error}); fetch or make it again"
        ) from error
    if origin is None:
        raise ValueError(f"{str(path)!r} has format {shown(found)}, this version reads {FORMAT}; update opensora_perflow")
    if not whole:
        raise ValueError(f"{str(path)!r} is not as it was written: its checksum is wrong; fetch or make it again")
    return origin, delta


def is_delta(state: Mapping[str, Tensor]) -> bool:
    """Are these a delta's tensors?"""
    return any(name.startswith(CHANGE) for name in state)


def _checksum(delta: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    hashed = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, value in sorted(delta.items()):
        hashed.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        hashed.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()
