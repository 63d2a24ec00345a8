"""Captions that were encoded once: shards of what text encoders said of them, whichever host's they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from opensora_perflow.checks import shown
from opensora_perflow.training.shards import Shards, ShardWriter, differences, read_indexes

KIND = "encoded captions"
REMEDY = "encode captions with `opensora-perflow encode CONFIG --out DIR`"
Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""The captions of a shard -> its tensors."""


class EncodedCaptions:
    """What `opensora-perflow encode` wrote into a folder, by caption.

    `is_v2`: Of Open-Sora 2.0, not of 1.x.

    Raises:
        ValueError: see Shards.open; a folder of the other Open-Sora.
    """

    def __init__(self, folder: str | os.PathLike, is_v2: bool) -> None:
        self._shards = Shards.open(folder, KIND, REMEDY)
        if is_v2 == ("model_max_length" in self.header):
            raise ValueError(
                f"{str(folder)!r} holds captions that were encoded for Open-Sora {'1.x' if is_v2 else '2.0'}; run "
                "`opensora-perflow encode` with this training's config, into another folder"
            )
        self._places: list[tuple[int, int]] = []
        self._ids: dict[str, int] = {}
        for number in self._shards.shards:
            for row, caption in enumerate(json.loads(self._shards.metadata(number)["captions"])):
                self._ids.setdefault(caption, len(self._places))
                self._places.append((number, row))

    @property
    def header(self) -> Mapping[str, Any]:
        return self._shards.header

    def id_of(self, caption: str) -> int:
        """The number of a caption.

        Raises:
            ValueError: a caption that was not encoded.
        """
        found = self._ids.get(caption)
        if found is None:
            raise ValueError(
                f"the text {shown(caption)} is none of the {len(self._ids)} captions that were encoded in "
                f"{str(self._shards.folder)!r}; add it to their table, and run `opensora-perflow encode` again"
            )
        return found

    def place(self, caption_id: int) -> tuple[int, int]:
        """Shard and row of a caption."""
        return self._places[caption_id]

    def tensor(self, number: int, name: str) -> Tensor:
        """See Shards.tensor."""
        return self._shards.tensor(number, name)


def encode_captions(
    folder: str | os.PathLike,
    captions: Sequence[str],
    encode: Encode,
    header: Mapping[str, Any],
    *,
    rows: int,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> int:
    """Encode the captions that a folder does not have yet; returns how many this process encoded.

    Args:
        header: What tells the text encoder from others.
        rows: Captions of a shard.
        rank, world: Of the processes that share the work.
        barrier: Waits for all of them.

    Raises:
        ValueError: see ShardWriter.
    """
    writer = ShardWriter(folder, KIND, header, rank, "encode into another folder")
    missing, whole = _missing(writer, captions)
    chunks = [missing[start : start + rows] for start in range(0, len(missing), rows)]
    # Numbers of lost shards first: an index that names one is right again.
    first = max(writer.done, default=-1) + 1
    numbers = [*sorted(writer.done.keys() - whole), *range(first, first + len(chunks))]
    barrier()  # all of them have seen the same
    count = 0
    for place, chunk in enumerate(chunks):
        if place % world == rank:
            writer.write(numbers[place], encode(chunk), {"captions": json.dumps(chunk)}, len(chunk))
            count += len(chunk)
    barrier()
    return count


def refuse_encoded(encoder: Mapping[str, Any]) -> None:
    """Raises ValueError where a config's text encoder is itself a folder of encoded captions."""
    if str(encoder.get("type")).startswith("perflow_encoded"):
        raise ValueError(
            f"the config takes its texts from the folder {encoder.get('folder')!r}, and nothing in it encodes; name the config "
            "that it is based on, with the text encoder"
        )


def are_encoded(folder: str | os.PathLike, captions: Sequence[str], text_encoder: Mapping[str, Any]) -> bool:
    """Does a folder have all of these captions?

    Raises:
        ValueError: the folder's were encoded by a text encoder with other settings than these.
    """
    header, _ = read_indexes(Path(folder), KIND)
    if header is None:
        return False
    if header["text_encoder"] != text_encoder:
        told = differences(header, {**header, "text_encoder": text_encoder})
        raise ValueError(f"{str(folder)!r} was begun with other settings: {told}; encode into another folder")
    return not _missing(ShardWriter(folder, KIND, header, 0, ""), captions)[0]


def _missing(writer: ShardWriter, captions: Sequence[str]) -> tuple[list[str], set[int]]:
    """Captions that a folder does not have, and the numbers of its whole shards."""
    whole = {number for number in writer.done if writer.is_there(number)}
    shards = Shards(writer.folder, writer.header, {number: writer.done[number] for number in whole})
    known = {caption for number in whole for caption in json.loads(shards.metadata(number)["captions"])}
    return [caption for caption in dict.fromkeys(captions) if caption not in known], whole
