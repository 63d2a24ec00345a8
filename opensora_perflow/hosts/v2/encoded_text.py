"""Texts of Open-Sora 2.0 that were encoded once: files of what T5 and CLIP said, and encoders that look them up.

T5 has no mask there, so that networks attend to its padding as well: all of its tokens are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts import encoded_captions
from opensora_perflow.hosts.encoded_captions import EncodedCaptions
from opensora_perflow.hosts.v2.text import noting_null

ROWS = 16
"""Captions of a shard: 64 MiB of 512 tokens of T5-XXL."""


class EncodedText(nn.Module):
    """Encoded texts as one of the host's text encoders, which holds no network.

    Args:
        folder: What `opensora-perflow encode` wrote.
        argument: Of the network: "txt" for T5, "y_vec" for CLIP.
        device, dtype: Of the answers.

    Raises:
        ValueError: see Shards.open.
    """

    def __init__(self, folder: str | os.PathLike, argument: str, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.argument, self.device, self.dtype = argument, device, dtype
        self._captions = EncodedCaptions(folder, is_v2=True)

    def forward(self, text: str | Sequence[str], added_tokens: int = 0, seq_align: int = 1) -> Tensor:
        """Texts -> [B, L, D] of T5, [B, D] of CLIP; one str counts as a batch of one.

        Raises:
            ValueError: a text that was not encoded, or a length that sequence parallelism does not split.
        """
        places = [self._captions.place(self._captions.id_of(one)) for one in ([text] if isinstance(text, str) else text)]
        said = torch.stack([self._captions.tensor(number, self.argument)[row] for number, row in places])
        if (added_tokens + said.shape[1]) % seq_align:
            raise ValueError(
                f"sp_size={seq_align} does not divide {added_tokens} tokens of a video and {said.shape[1]} of its text, which "
                "only T5 can lengthen; use perflow_t5, or another sp_size"
            )
        return said.to(self.device, self.dtype)


def perflow_encoded_t5(
    folder: str, device_map: Any = "cpu", torch_dtype: torch.dtype = torch.bfloat16, **others: Any
) -> EncodedText:
    """Encoded texts as Open-Sora's T5; others, such as another encoder's settings, are taken and ignored."""
    return noting_null(EncodedText(folder, "txt", device_map, torch_dtype), "txt")


def perflow_encoded_clip(
    folder: str, device_map: Any = "cpu", torch_dtype: torch.dtype = torch.bfloat16, **others: Any
) -> EncodedText:
    """Encoded texts as Open-Sora's CLIP; arguments as `perflow_encoded_t5`."""
    return noting_null(EncodedText(folder, "y_vec", device_map, torch_dtype), "y_vec")


def encode_captions(
    folder: str | os.PathLike,
    captions: Sequence[str],
    t5: Callable[..., Tensor],
    clip: Callable[..., Tensor],
    header: Mapping[str, Any],
    *,
    progress: Callable[[int], Any] = lambda count: None,
    **workers: Any,
) -> int:
    """Encode the captions that a folder does not have yet; returns how many this process encoded.

    Args:
        header: What tells the text encoders from others.
        progress: Told how many more captions are done.
        workers: rank, world and barrier, see encoded_captions.encode_captions.

    Raises:
        ValueError: see ShardWriter.
    """

    @torch.no_grad()
    def shard(texts: Sequence[str]) -> dict[str, Tensor]:
        said = {"txt": t5(list(texts)), "y_vec": clip(list(texts))}
        progress(len(texts))
        return said

    return encoded_captions.encode_captions(folder, captions, shard, header, rows=ROWS, **workers)
