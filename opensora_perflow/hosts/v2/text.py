"""The texts that guidance leads away from: Open-Sora 2.0 keeps them in a variable of its train.py alone.

Its script asks both encoders for the embedding of "" once, before the first step. Encoders that are built as perflow_t5 and
perflow_clip note their answers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NULLS: dict[str, Tensor] = {}
"""Argument of the network ("txt", "y_vec") -> the embedding of "", [1, ...]."""


def noting_null(encoder: nn.Module, argument: str) -> nn.Module:
    """The encoder, which notes what it answers to ""."""

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if args and args[0] == "":
            _NULLS[argument] = output.detach()

    encoder.register_forward_hook(note)
    return encoder


def note_nulls(txt: Tensor, y_vec: Tensor) -> None:
    """Note embeddings of the empty or of other prompts, [1, ...] or one for each of a batch's samples."""
    _NULLS.update(txt=txt, y_vec=y_vec)


def null_text(told: dict[str, Tensor]) -> dict[str, Tensor]:
    """txt and y_vec of the empty prompt, shaped like those of a batch.

    Text that was lengthened for sequence parallelism repeats the null's last token, as train.py's dropout does.

    Raises:
        ValueError: an encoder was not built as perflow_t5 or perflow_clip, or has other sizes.
    """
    missing = [kind for argument, kind in (("txt", "t5"), ("y_vec", "clip")) if argument not in _NULLS]
    if missing:
        raise ValueError(
            f"guidance needs the embedding of the empty prompt, and nobody noted {' or '.join(missing)}'s: write "
            + " and ".join(f'{kind}=dict(type="perflow_{kind}", ...)' for kind in missing)
            + ' in place of type="text_embedder". With cached_text there are no encoders, so guidance cannot be folded in'
        )
    (txt, y_vec), (like, vec) = ((of["txt"], of["y_vec"]) for of in (_NULLS, told))
    longer = like.shape[1] - txt.shape[1]
    if txt.shape[2:] != like.shape[2:] or longer < 0 or y_vec.shape[1:] != vec.shape[1:]:
        raise ValueError(
            f"the empty prompt's embeddings are {list(txt.shape)} and {list(y_vec.shape)}, the batch's {list(like.shape)} and "
            f"{list(vec.shape)}; text encoders and cached texts must be of the same sizes"
        )
    txt = torch.cat([txt, txt[:, -1:].expand(-1, longer, -1)], dim=1)
    return {"txt": txt.to(like).expand_as(like), "y_vec": y_vec.to(vec).expand_as(vec)}
