"""torch's AdamW for ColossalAI's HybridAdam, whose update is a kernel compiled for CUDA or, on a CPU, at first use.

scripts/train.py builds it (v1.2.0:166, v1.3:181) with adamw_mode=True: the same update as AdamW, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

from torch.optim import AdamW

from opensora_perflow.portable.imports import announce, has_cuda, is_installed, when_imported

NAME = "adam"


class HybridAdam(AdamW):
    """AdamW with HybridAdam's arguments.

    Raises:
        ValueError: an argument asks for something AdamW does not do.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adamw_mode: bool = True,
        nvme_offload_fraction: float = 0.0,
        nvme_offload_dir: str | None = None,
    ) -> None:
        # Without weight decay Adam and AdamW are one and the same.
        if not bias_correction or not (adamw_mode or weight_decay == 0) or nvme_offload_fraction:
            raise ValueError(
                "without CUDA, HybridAdam is torch's AdamW and takes bias_correction=True, adamw_mode=True (or no "
                f"weight decay) and nvme_offload_fraction=0, got {bias_correction}, {adamw_mode} "
                f"(weight_decay={weight_decay}) and {nvme_offload_fraction}; drop the argument or run on CUDA"
            )
        super().__init__(model_params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)


def _replace(module: ModuleType) -> None:
    module.HybridAdam = HybridAdam


def install() -> bool:
    if has_cuda() or not is_installed("colossalai"):
        return False
    when_imported("colossalai.nn.optimizer", _replace)
    announce(NAME, "torch's AdamW answers for HybridAdam, because its kernel is not compiled on a machine without CUDA")
    return True
