"""Text dropout that asks for CUDA: `torch.rand(n).cuda()` in token_drop of the host's caption and label embedders.

models/layers/blocks.py v1.2.0:652 and 731, v1.3:961 and 1041. The draw is made by the CPU generator either way, so that
a run without CUDA drops the same samples as one with it.
"""

from __future__ import annotations

from types import ModuleType

from opensora_perflow.portable.imports import announce, has_cuda, on_cpu, source_mentions, when_imported

NAME = "text_dropout"


def _wrap(module: ModuleType) -> None:
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__ and "token_drop" in vars(value):
            value.token_drop = on_cpu(value.token_drop)


def install() -> bool:
    if has_cuda() or not source_mentions("opensora", "models/layers/blocks.py", ".cuda()"):
        return False
    when_imported("opensora.models.layers.blocks", _wrap)
    announce(NAME, "token_drop keeps its random draw on the CPU, because this machine has no CUDA device to move it to")
    return True
