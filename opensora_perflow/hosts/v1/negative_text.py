"""The embedding of a negative prompt, as a file: guidance that is folded into a student needs it where no text encoder is.

Open-Sora's train.py gives its scheduler no text encoder, and mode fixed and mode range need a negative prompt in training. The
file holds `y` [1, L, D] and `mask` [1, L], as the host's text encoder makes them (safetensors).
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.v1.conditions import encode_text

MOST_BYTES = 2**26
"""Of an embedding: T5-XXL's of 300 tokens has 5 million."""


def write_negative(path: str | os.PathLike, text_encoder: Any, prompt: str) -> None:
    """Write a negative prompt's embedding.

    Args:
        path: File to write, atomically; ends in .safetensors.
        text_encoder: The host's, with which the videos' captions are encoded in training too.
        prompt: The negative prompt.

    Raises:
        ValueError: another suffix.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"a negative prompt is written as .safetensors, got {str(path)!r}")
    with torch.no_grad():
        encoded = encode_text(text_encoder, [prompt])
    write_state_dict(path, {"y": encoded["y"][0], "mask": encoded["mask"]}, {"prompt": prompt})


def read_negative(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors `y` [1, L, D] and `mask` [1, L] of a file that `write_negative` wrote.

    Raises:
        ValueError: no such file, or one with other contents.
    """
    remedy = "write it with `opensora-perflow embed`"
    try:
        if os.path.getsize(path) > MOST_BYTES:
            raise OSError(f"it is larger than {MOST_BYTES} bytes")
        found = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"guidance.negative {str(path)!r} cannot be read ({error}); {remedy}") from error
    shapes = {name: list(value.shape) for name, value in sorted(found.items())}
    fits = shapes.keys() == {"y", "mask"} and [len(s) for s in shapes.values()] == [2, 3] and shapes["mask"] == shapes["y"][:2]
    if not fits or shapes["mask"][0] != 1:
        raise ValueError(f"guidance.negative {str(path)!r} must hold y [1, L, D] and mask [1, L], got {shapes}; {remedy}")
    y, mask = found["y"], found["mask"]
    tokens = int(mask.count_nonzero())
    if not y.is_floating_point() or not bool(y.isfinite().all()) or tokens == 0 or mask.is_complex():
        raise ValueError(
            f"guidance.negative {str(path)!r} must hold finite numbers y and a mask that marks tokens, got y of {y.dtype} and "
            f"a mask of {mask.dtype} that marks {tokens}; {remedy}"
        )
    return found
