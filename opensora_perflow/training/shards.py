"""A folder of shards: safetensors files, and for each writer an index that says which of them are whole.

    000000.safetensors  000001.safetensors  ...  index-00000.json  index-00001.json

A shard enters its writer's index after the file has taken its place, and both are written atomically. A writer that is killed
loses the shard in its hands and nothing else. The index holds each file's size and SHA-256, so that a file that was cut or
edited is refused. All writers write the same header, which says what the shards are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensora_perflow import __version__
from opensora_perflow.atomic import replacing
from opensora_perflow.checkpoints import read_metadata
from opensora_perflow.checks import parse_json, read_bounded

FORMAT = "opensora_perflow.shards/1"
MOST_INDEX_BYTES = 2**28
OPEN_FILES = 64


@dataclass(frozen=True)
class Shard:
    """What an index says of a file. size: bytes. rows: samples in the shard; 0: it was left out, and there is no file. about:
    what else its writer says, plain JSON."""

    size: int
    sha256: str
    rows: int
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shards:
    """The whole shards of a folder, by number.

    folder: Where they are. header: What the shards are, plain JSON.
    """

    folder: Path
    header: dict[str, Any]
    shards: dict[int, Shard]

    @classmethod
    def open(cls, folder: str | os.PathLike, kind: str, remedy: str) -> Shards:
        """The shards that a folder's indexes name.

        Args:
            kind: What has to be in there, in words; see `ShardWriter`.
            remedy: How to make such a folder, for errors.

        Raises:
            ValueError: no index, one that is damaged or of another kind, two that disagree, or a shard that is missing or of
                another size than the index says.
        """
        folder = Path(folder)
        header, shards = read_indexes(folder, kind)
        if header is None or not any(shard.rows for shard in shards.values()):
            raise ValueError(f"{str(folder)!r} holds no {kind}: {'nothing in it is whole' if header else 'no index'}; {remedy}")
        for number, shard in shards.items():
            size = _size(folder / file_name(number))
            if shard.rows and size != shard.size:
                found = "is missing" if size is None else f"has {size} bytes, and the index says {shard.size}"
                raise ValueError(
                    f"{str(folder / file_name(number))!r} {found}; remove the file, and run the command again that wrote it"
                )
        return cls(folder, header, shards)

    def tensor(self, number: int, name: str) -> Tensor:
        """A tensor of a shard, mapped into memory and read where it is used. A file's SHA-256 is compared once in a process.

        Raises:
            ValueError: the file is not what was written.
        """
        return _open_checked(str(self.folder / file_name(number)), self.shards[number].sha256)[name]

    def metadata(self, number: int) -> dict[str, str]:
        """The strings that a shard keeps beside its tensors; its SHA-256 is not compared."""
        return read_metadata(self.folder / file_name(number))


class ShardWriter:
    """Adds shards to a folder.

    Args:
        folder: Made if it is missing.
        kind: What the shards are, in words.
        header: The same for all writers of a folder, plain JSON.
        rank: Of this writer among those that write at the same time.
        remedy: What to do about a folder with another header, for errors.

    Raises:
        ValueError: the folder holds shards with another header.
    """

    def __init__(self, folder: str | os.PathLike, kind: str, header: Mapping[str, Any], rank: int, remedy: str) -> None:
        self.folder, self.kind, self.rank = Path(folder), kind, rank
        self.header = json.loads(json.dumps(header))
        found, self.done = read_indexes(self.folder, kind)
        if found is not None and found != self.header:
            raise ValueError(f"{str(folder)!r} was begun with other settings: {differences(found, self.header)}; {remedy}")
        self._own: dict[int, Shard] = _read_index(self.folder / index_name(rank), kind)[1] if found is not None else {}
        self._own = {number: shard for number, shard in self._own.items() if self.is_there(number)}

    def is_there(self, number: int) -> bool:
        """Is a shard in an index, and its file of the right size or left out? Whatever is not is to be written again."""
        shard = self.done.get(number)
        return shard is not None and (not shard.rows or _size(self.folder / file_name(number)) == shard.size)

    def write(self, number: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], rows: int, **about: Any) -> None:
        """Write a shard and enter it in the index; `about`: see Shard."""
        path = self.folder / file_name(number)
        self._remove_leftovers(path.stem)
        with replacing(path) as temporary:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, dict(metadata))
            shard = Shard(temporary.stat().st_size, sha256(temporary), rows, about)
        self.done[number] = self._own[number] = shard
        self._write_index()

    def leave_out(self, number: int) -> None:
        """Enter a shard of no samples in the index, so that nobody waits for it."""
        self.done[number] = self._own[number] = Shard(0, "", 0)
        self._write_index()

    def _write_index(self) -> None:
        path = self.folder / index_name(self.rank)
        self._remove_leftovers(path.stem)
        shards = {str(number): asdict(shard) for number, shard in sorted(self._own.items())}
        content = {"format": FORMAT, "kind": self.kind, "version": __version__, "header": self.header, "shards": shards}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n")

    def _remove_leftovers(self, stem: str) -> None:
        """Take away what a killed writer left beside a file: no other writes the same one at the same time."""
        for path in self.folder.glob(f".{stem}.*"):
            with suppress(FileNotFoundError):
                path.unlink()


def file_name(number: int) -> str:
    return f"{number:06d}.safetensors"


def index_name(rank: int) -> str:
    return f"index-{rank:05d}.json"


def read_indexes(folder: Path, kind: str) -> tuple[dict[str, Any] | None, dict[int, Shard]]:
    """The header of a folder's indexes and all shards that they name; None and none where there is no index.

    Raises:
        ValueError: an index that is damaged or of another kind, or two with different headers.
    """
    header, shards = None, {}
    # By age: a shard that was damaged and written anew may be in two, and the newer index is right.
    for path in sorted(folder.glob("index-*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        found, named = _read_index(path, kind)
        if header is not None and found != header:
            raise ValueError(f"the indexes in {str(folder)!r} disagree: {differences(header, found)}; keep those of one run")
        header = found
        shards |= named
    return header, dict(sorted(shards.items()))


def _read_index(path: Path, kind: str) -> tuple[dict[str, Any] | None, dict[int, Shard]]:
    if not path.is_file():
        return None, {}
    try:
        content = parse_json(read_bounded(path, MOST_INDEX_BYTES), MOST_INDEX_BYTES)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version reads {FORMAT!r}")
        shards = {int(number): Shard(**values) for number, values in content["shards"].items()}
        there = [shard for shard in shards.values() if shard.rows != 0]
        if not all(re.fullmatch("[0-9a-f]{64}", shard.sha256) and shard.rows > 0 for shard in there):
            raise ValueError("a shard without rows or checksum")
        found, header = content["kind"], dict(content["header"])
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is no index that this package wrote ({type(error).__name__}: {error}); restore the file, or remove "
            "it to have its shards written again"
        ) from error
    if found != kind:
        raise ValueError(f"{str(path.parent)!r} holds {found}, and {kind} are wanted; name another folder")
    return header, shards


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In which settings two headers differ, in words: the first one's value there, the second one's here."""
    names = [name for name in dict.fromkeys([*found, *wanted]) if found.get(name) != wanted.get(name)]
    return "; ".join(f"{name} is {found.get(name)} there and {wanted.get(name)} here" for name in names)


def sha256(path: str | os.PathLike) -> str:
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            hashed.update(block)
    return hashed.hexdigest()


def text_digest(texts: Iterable[str]) -> str:
    """Identity of a list of texts, 16 hex digits."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


@lru_cache(maxsize=OPEN_FILES)
def _open_checked(path: str, expected: str) -> dict[str, Tensor]:
    _check_sum(path, expected)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@cache
def _check_sum(path: str, expected: str) -> None:
    if sha256(path) != expected:
        raise ValueError(
            f"{path!r} is not what was written (its SHA-256 differs from the index's); remove the file, and run the command "
            "again that wrote it"
        )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
