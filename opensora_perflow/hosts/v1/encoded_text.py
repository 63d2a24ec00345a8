"""Captions that were encoded once: files of their embeddings, and a text encoder that looks them up.

`EncodedText` answers Open-Sora's scripts as their T5 does, for the captions that it has, and holds no network. Only the tokens
up to the last that a mask marks are kept: STDiT takes no others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.atomic import replacing
from opensora_perflow.checks import parse_json, read_bounded, shown
from opensora_perflow.training.shards import Shards, ShardWriter, read_indexes

KIND = "encoded captions"
REMEDY = "encode captions with `opensora-perflow encode CONFIG --out DIR`"
ROWS = 256
"""Captions of a shard."""
SIZES = "latents.json"
"""In a folder of captions: "frames x height x width" of videos -> shape C, T, H, W of their latents."""
Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Captions -> y [B, 1, L, D] and mask [B, L]."""


class EncodedText:
    """Encoded captions as the host's text encoder.

    Args:
        folder: What `opensora-perflow encode` wrote.
        device, dtype: Where and as what embeddings are given out; dtype None: as they were encoded.
        others: Taken and ignored, as other text encoders' settings in a config that changes `type` alone.

    Raises:
        ValueError: see Shards.open.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        **others: Any,
    ) -> None:
        self._shards = Shards.open(folder, KIND, REMEDY)
        self.model_max_length, self.output_dim = (self._shards.header[name] for name in ("model_max_length", "output_dim"))
        self.device, self.dtype = torch.device(device), dtype
        self.y_embedder: nn.Module | None = None  # the host's scripts put the model's own here, for `null`
        self._places: list[tuple[int, int]] = []
        self._ids: dict[str, int] = {}
        for number in self._shards.shards:
            for row, caption in enumerate(json.loads(self._shards.metadata(number)["captions"])):
                self._ids.setdefault(caption, len(self._places))
                self._places.append((number, row))

    def tokenize_fn(self, text: str | Sequence[str]) -> dict[str, Tensor]:
        """Captions -> dict(input_ids, attention_mask), int64 [B, 1]: their numbers here (v1.3 calls this in the dataset)."""
        captions = [text] if isinstance(text, str) else list(text)
        ids = torch.tensor([self._id(caption) for caption in captions])[:, None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def encode(
        self,
        text: Sequence[str] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """dict(y=[B, 1, L, D], mask=int64 [B, L]) of captions, or of what `tokenize_fn` gave.

        Raises:
            ValueError: a caption that was not encoded.
        """
        ids = text if input_ids is None else input_ids
        ids = ids if isinstance(ids, Tensor) else self.tokenize_fn(ids)["input_ids"]
        y, mask = zip(*map(self._embedding, ids.flatten().tolist()))
        return {"y": torch.stack(y).to(self.device, self.dtype)[:, None], "mask": torch.stack(mask).to(self.device)}

    def null(self, n: int) -> Tensor:
        """The model's null text for n samples, [n, 1, L, D]."""
        return self.y_embedder.y_embedding[None].repeat(n, 1, 1)[:, None]

    def _id(self, caption: str) -> int:
        found = self._ids.get(caption)
        if found is None:
            raise ValueError(
                f"the text {shown(caption)} is none of the {len(self._ids)} captions that were encoded in "
                f"{str(self._shards.folder)!r}; add it to their table, and run `opensora-perflow encode` again"
            )
        return found

    def _embedding(self, caption_id: int) -> tuple[Tensor, Tensor]:
        number, row = self._places[caption_id]
        ends = self._shards.tensor(number, "ends")
        first, end = int(ends[row - 1]) if row else 0, int(ends[row])
        tokens, marks = (self._shards.tensor(number, name)[first:end] for name in ("y", "mask"))
        y = tokens.new_zeros(self.model_max_length, self.output_dim)
        mask = torch.zeros(self.model_max_length, dtype=torch.int64)
        y[: end - first], mask[: end - first] = tokens, marks.long()
        return y, mask


def encode_captions(
    folder: str | os.PathLike,
    captions: Sequence[str],
    encode: Encode,
    header: Mapping[str, Any],
    *,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int], Any] = lambda count: None,
    batch_size: int = 16,
) -> int:
    """Encode the captions that a folder does not have yet; returns how many this process encoded.

    Args:
        header: model_max_length and output_dim of the text encoder, and what else tells it from others.
        rank, world: Of the processes that share the work.
        barrier: Waits for all of them.
        progress: Told how many more captions are done.

    Raises:
        ValueError: see ShardWriter.
    """
    writer = ShardWriter(folder, KIND, header, rank, "encode into another folder")
    missing, whole = _missing(writer, captions)
    chunks = [missing[start : start + ROWS] for start in range(0, len(missing), ROWS)]
    # Numbers of lost shards first: an index that names one is right again.
    first = max(writer.done, default=-1) + 1
    numbers = [*sorted(writer.done.keys() - whole), *range(first, first + len(chunks))]
    barrier()  # all of them have seen the same
    count = 0
    for place, chunk in enumerate(chunks):
        if place % world == rank:
            rows = [
                row
                for start in range(0, len(chunk), batch_size)
                for row in _rows(encode(chunk[start : start + batch_size]), progress)
            ]
            lengths = torch.tensor([len(mask) for _, mask in rows])
            tensors = {
                "y": torch.cat([y for y, _ in rows]),
                "mask": torch.cat([mask for _, mask in rows]),
                "ends": lengths.cumsum(0),
            }
            writer.write(numbers[place], tensors, {"captions": json.dumps(chunk)}, len(chunk))
            count += len(chunk)
    barrier()
    return count


def are_encoded(folder: str | os.PathLike, captions: Sequence[str], text_encoder: Mapping[str, Any]) -> bool:
    """Does a folder have all of these captions, encoded by a text encoder with these settings?"""
    header, _ = read_indexes(Path(folder), KIND)
    if header is None or header["text_encoder"] != text_encoder:
        return False
    return not _missing(ShardWriter(folder, KIND, header, 0, ""), captions)[0]


def _missing(writer: ShardWriter, captions: Sequence[str]) -> tuple[list[str], set[int]]:
    """Captions that a folder does not have, and the numbers of its whole shards."""
    whole = {number for number in writer.done if writer.is_there(number)}
    shards = Shards(writer.folder, writer.header, {number: writer.done[number] for number in whole})
    known = {caption for number in whole for caption in json.loads(shards.metadata(number)["captions"])}
    return [caption for caption in dict.fromkeys(captions) if caption not in known], whole


def write_latent_sizes(folder: str | os.PathLike, sizes: Mapping[Sequence[int], Sequence[int]]) -> None:
    """Write SIZES: (frames, height, width) -> C, T, H, W."""
    with replacing(Path(folder) / SIZES) as temporary:
        temporary.write_text(json.dumps({_size(*size): list(latent) for size, latent in sizes.items()}) + "\n")


def read_latent_sizes(folder: str | os.PathLike) -> Callable[[int, int, int], tuple[int, ...]]:
    """(frames, height, width) -> C, T, H, W, as SIZES in a folder says.

    Raises:
        ValueError: no such file, or another; later, a size that it does not have.
    """
    path = Path(folder) / SIZES
    try:
        known = {str(size): tuple(map(int, latent)) for size, latent in parse_json(read_bounded(path)).items()}
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} says no sizes of latents ({error}); {REMEDY}") from error

    def latent_size(num_frames: int, height: int, width: int) -> tuple[int, ...]:
        if _size(num_frames, height, width) not in known:
            raise ValueError(
                f"{str(path)!r} does not have the latents of {num_frames} frames of {height} x {width}; run `opensora-perflow "
                "encode` again with the bucket_config of this training"
            )
        return known[_size(num_frames, height, width)]

    return latent_size


def _size(num_frames: int, height: int, width: int) -> str:
    return f"{num_frames} x {height} x {width}"


def _rows(encoded: Mapping[str, Tensor], progress: Callable[[int], Any]) -> list[tuple[Tensor, Tensor]]:
    """(y [n, D], mask uint8 [n]) of each caption, up to the last token that its mask marks."""
    rows = []
    for y, mask in zip(encoded["y"][:, 0].cpu(), encoded["mask"].cpu()):
        length = int(mask.nonzero().max()) + 1
        rows.append((y[:length], mask[:length].to(torch.uint8)))
    progress(len(rows))
    return rows
