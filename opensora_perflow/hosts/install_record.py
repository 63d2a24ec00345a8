"""The record of what `install` put into a checkout, and how its files are written: whole, and never out of the checkout."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from opensora_perflow.checks import check_keys, from_mapping, key, parse_json, read_bounded, shown, switch, words

RECORD = ".perflow_install.json"
"""Name of the file that says what was put into a tree: the fields of `Record`."""

PATCHED = "opensora/schedulers/__init__.py"
"""The file that our patches change."""


def _patch(name: str, value: Any) -> str:
    """A patch of the one file that ours change: it will be taken back."""
    text = words(name, value)
    touched = set(re.findall(r"^(?:---|\+\+\+) (.+)$", text, re.M))
    more = re.search(r"^(?:(?:rename|copy) (?:from|to)|(?:deleted|new) file mode|old mode) ", text, re.M)
    if more or touched - {f"a/{PATCHED}", f"b/{PATCHED}"}:
        raise ValueError(f"{name} may change {PATCHED} alone, got {shown(sorted(touched))}")
    return text


def _configs(name: str, value: Any) -> dict[str, str]:
    """Names and contents of configs: they will be removed, so that none may be another's file."""
    if not isinstance(value, Mapping) or len(value) > 1000:
        raise ValueError(f"{name} must be an object, got {shown(value)}")
    for path in value:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{path!r} leads out of the folder of configs")
        if not re.fullmatch(r"((train/|inference/)?perflow_\w+|_base_/\w+)\.py", path):
            raise ValueError(f"{shown(path)} is no name of a config of this package")
    return {path: words(f"{name}[{path!r}]", content) for path, content in value.items()}


@dataclass(frozen=True)
class Tree:
    """A checkout of Open-Sora, and what of this package goes where in it."""

    root: Path
    tag: str

    @property
    def folder(self) -> str:
        """Where it takes our configs, and the record."""
        return "configs/diffusion" if self.tag == "2.0" else "configs/opensora"

    @property
    def source(self) -> tuple[str, tuple[str, ...]]:
        """Which configs: the folder below this package's configs, and patterns below that one. They keep their names."""
        if self.tag == "2.0":
            return "opensora/v2", ("train/perflow_*.py", "inference/perflow_*.py")
        return "opensora", ("perflow_*.py", "_base_/*.py")

    def name(self, config: str) -> str:
        """Path of a config in the tree, for messages."""
        return f"{self.folder}/{config}"

    def path(self, config: str) -> Path:
        """Path of a config."""
        return self.root / self.folder / config


@dataclass(frozen=True)
class Record:
    """What `install` put into a tree."""

    version: str = key(MISSING, words)
    """Of this package."""
    patch: str = key(MISSING, _patch)
    """Text of the patch; empty for a host that needs none."""
    copied: bool = key(MISSING, switch)
    """Whether the configs are copies; else they are links."""
    configs: Mapping[str, str] = key(MISSING, _configs)
    """Path below the folder of configs -> what was put there, as `_content` tells it."""

    def __post_init__(self) -> None:
        check_keys(self)


def part_of(path: Path) -> Path:
    """Where a file is written before it takes its place. The name is known, so that what a killed process left is found."""
    return path.with_name(f".{path.name}.part")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is seen whole or not at all, also where the process is killed."""
    part = part_of(path)
    part.unlink(missing_ok=True)  # it may be a link
    part.write_bytes(content)
    os.replace(part, path)


def write_record(tree: Tree, record: Record) -> None:
    """Write the record into a tree."""
    write_whole(tree.path(RECORD), (json.dumps(asdict(record), indent=1) + "\n").encode())


def read_record(tree: Tree) -> Record | None:
    """The record in a tree; None without. Raises ValueError for one that `write_record` did not write."""
    path, name = tree.path(RECORD), tree.name(RECORD)
    if not path.is_file():
        return None
    try:
        return from_mapping(Record, parse_json(read_bounded(path)), name)
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be read ({error}); it says what was put into this tree, so restore it, or remove it and the "
            f"perflow configs in {tree.folder} by hand"
        ) from error


def refuse_links(tree: Tree, configs: Iterable[str]) -> None:
    """Raises ValueError where a folder of configs is a link that leads out of the tree, where nothing is to be changed."""
    for folder in sorted({tree.path(name).parent for name in configs}):
        if not folder.resolve().is_relative_to(tree.root):
            raise ValueError(
                f"{folder.relative_to(tree.root).as_posix()} is a link to {str(folder.resolve())!r}, out of the checkout, "
                "where nothing is put or removed; make it a folder"
            )
