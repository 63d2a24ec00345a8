"""flash_attn on torch's scaled_dot_product_attention, for Open-Sora 2.0.

models/mmdit/math.py:3 imports flash_attn_func, and models/mmdit/distributed.py:16 the two functions of ring attention. The
package has no kernel without CUDA.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from opensora_perflow.portable.imports import announce, has_cuda, is_installed, provide_modules, source_mentions
from opensora_perflow.portable.xformers_attention import memory_efficient_attention

NAME = "flash_attention"


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, per head.

    Args:
        q: [B, Lq, H, D], any floating dtype, any device. `k`, `v`: [B, Lk, H, D].

    Returns:
        [B, Lq, H, D], contiguous, in q's dtype. Gradients flow.

    Raises:
        ValueError: shapes that do not belong together.
    """
    return memory_efficient_attention(q, k, v)


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    """Ring attention, which needs the log-sum-exp of each piece.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("ring attention was called, but flash_attn is not usable here; set sp_size=1, or install it with CUDA")


def install() -> bool:
    if is_installed("flash_attn") and has_cuda():
        return False
    if not source_mentions("opensora", "models/mmdit/math.py", "flash_attn"):
        return False
    ring = {"_flash_attn_forward": refuse, "_flash_attn_backward": refuse}
    provide_modules(__name__, {"flash_attn": {"flash_attn_func": flash_attn_func}, "flash_attn.flash_attn_interface": ring})
    reason = "has no kernel without CUDA" if not has_cuda() else "is not installed"
    announce(NAME, f"flash_attn now computes attention with torch, because the package {reason}")
    return True
