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
from opensora_perflow.checks import parse_json, read_bounded
from opensora_perflow.hosts import encoded_captions
from opensora_perflow.hosts.encoded_captions import REMEDY, EncodedCaptions

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
        self._captions = EncodedCaptions(folder, is_v2=False)
        self.model_max_length, self.output_dim = (self._captions.header[name] for name in ("model_max_length", "output_dim"))
        self.device, self.dtype = torch.device(device), dtype
        self.y_embedder: nn.Module | None = None  # the host's scripts put the model's own here, for `null`

    def tokenize_fn(self, text: str | Sequence[str]) -> dict[str, Tensor]:
        """Captions -> dict(input_ids, attention_mask), int64 [B, 1]: their numbers here (v1.3 calls this in the dataset)."""
        captions = [text] if isinstance(text, str) else list(text)
        ids = torch.tensor([self._captions.id_of(caption) for caption in captions])[:, None]
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

    def _embedding(self, caption_id: int) -> tuple[Tensor, Tensor]:
        number, row = self._captions.place(caption_id)
        ends = self._captions.tensor(number, "ends")
        first, end = int(ends[row - 1]) if row else 0, int(ends[row])
        tokens, marks = (self._captions.tensor(number, name)[first:end] for name in ("y", "mask"))
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
    progress: Callable[[int], Any] = lambda count: None,
    batch_size: int = 16,
    **workers: Any,
) -> int:
    """Encode the captions that a folder does not have yet; returns how many this process encoded.

    Args:
        header: model_max_length and output_dim of the text encoder, and what else tells it from others.
        progress: Told how many more captions are done.
        workers: rank, world and barrier, see encoded_captions.encode_captions.

    Raises:
        ValueError: see ShardWriter.
    """

    def shard(texts: Sequence[str]) -> dict[str, Tensor]:
        parts = (texts[start : start + batch_size] for start in range(0, len(texts), batch_size))
        rows = [row for part in parts for row in _rows(encode(part), progress)]
        lengths = torch.tensor([len(mask) for _, mask in rows])
        return {
            "y": torch.cat([y for y, _ in rows]),
            "mask": torch.cat([mask for _, mask in rows]),
            "ends": lengths.cumsum(0),
        }

    return encoded_captions.encode_captions(folder, captions, shard, header, rows=ROWS, **workers)


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
