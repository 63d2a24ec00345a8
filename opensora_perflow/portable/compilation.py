"""torch.compile in Open-Sora 2.0, whose compilation takes minutes on a CPU and wants a C++ compiler.

models/mmdit/layers.py:68 compiles the embedding of the time, scripts/diffusion/train.py:225 the VAE's encoder. The functions
themselves give the same numbers, up to rounding.
"""

from __future__ import annotations

import os

from opensora_perflow.portable.imports import announce, has_cuda, source_mentions

NAME = "compilation"


def install() -> bool:
    if has_cuda() or not source_mentions("opensora", "models/mmdit/layers.py", "@torch.compile"):
        return False
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch reads it at each torch.compile
    announce(NAME, "torch.compile returns what it is given, because this machine has no CUDA to compile for")
    return True
