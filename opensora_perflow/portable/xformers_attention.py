"""xformers.ops on torch's scaled_dot_product_attention: the two names the host uses, on any device torch runs on.

Open-Sora imports xformers.ops at the top of models/layers/blocks.py (v1.2.0:22, v1.3:24) and calls
`memory_efficient_attention` with a `fmha.BlockDiagonalMask` (v1.2.0:469-470 and 517-518; v1.3:739-740, 773-774 and
826-827). The package has no kernel for that mask without CUDA, so a CPU machine needs this even where it is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_perflow.portable.imports import announce, has_cuda, is_installed, provide_modules

NAME = "xformers_attention"


def _lengths(seqlens: Sequence[int], what: str) -> tuple[int, ...]:
    lengths = tuple(int(length) for length in seqlens)
    if not lengths or min(lengths) < 0:
        raise ValueError(f"{what} must be one or more lengths >= 0, got {list(lengths)}; give one length per sequence")
    return lengths


@dataclass(frozen=True)
class BlockDiagonalMask:
    """Sequences packed one after the other along the token axis; a query sees the keys of its own sequence only.

    Attributes:
        q_lengths, kv_lengths: Tokens of each sequence on the query and on the key side, in packing order.
    """

    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None) -> BlockDiagonalMask:
        """Mask of packed sequences; without `kv_seqlen` keys are packed as queries are.

        Raises:
            ValueError: no length, a negative length, or not as many on the key side as on the query side.
        """
        q_lengths = _lengths(q_seqlen, "q_seqlen")
        kv_lengths = q_lengths if kv_seqlen is None else _lengths(kv_seqlen, "kv_seqlen")
        if len(q_lengths) != len(kv_lengths):
            raise ValueError(
                f"q_seqlen and kv_seqlen must name the same sequences, got {len(q_lengths)} lengths {list(q_lengths)} "
                f"and {len(kv_lengths)} lengths {list(kv_lengths)}; give one length of each kind per sequence"
            )
        return cls(q_lengths, kv_lengths)

    def materialize(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        """The same mask as a dense additive bias [..., Mq, Mk]: 0 where a query may look, -inf elsewhere."""
        query_ids = torch.arange(len(self.q_lengths)).repeat_interleave(torch.tensor(self.q_lengths))
        key_ids = torch.arange(len(self.kv_lengths)).repeat_interleave(torch.tensor(self.kv_lengths))
        bias = torch.zeros(len(query_ids), len(key_ids), dtype=dtype)
        bias = bias.masked_fill(query_ids[:, None] != key_ids[None, :], float("-inf"))
        return bias.to(device).expand(*shape)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    q_shape, k_shape, v_shape = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    fits = (
        query.dim() == 4
        and key.dim() == value.dim() == 4
        and q_shape[0] == k_shape[0] == v_shape[0]
        and k_shape[1] == v_shape[1]
        and q_shape[2:] == k_shape[2:]
        and k_shape[2] == v_shape[2]
    )
    if not fits:
        raise ValueError(
            f"attention takes query [B, Mq, H, K], key [B, Mk, H, K] and value [B, Mk, H, Kv], got {list(q_shape)}, "
            f"{list(k_shape)} and {list(v_shape)}; reshape them to that layout"
        )


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, p: float, scale: float | None) -> Tensor:
    """[B, M, H, K] in and out; torch wants heads before tokens."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias, dropout_p=p, scale=scale
    )
    return out.transpose(1, 2)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: BlockDiagonalMask | Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * query key^T + bias) value, per head, with dropout probability `p` on the softmax.

    Args:
        query: [B, Mq, H, K]. `key` [B, Mk, H, K], `value` [B, Mk, H, Kv]; any floating dtype, any device.
        attn_bias: None, an additive bias [B, H, Mq, Mk] (or broadcastable to it), or a BlockDiagonalMask. The mask wants B = 1
            and lengths that add up to Mq and Mk. A sequence without keys gives zeros.
        scale: Factor on the scores; None means K ** -0.5.

    Returns:
        [B, Mq, H, Kv], contiguous (the host calls `.view` on it), in the query's dtype. Gradients flow.

    Raises:
        ValueError: shapes that do not belong together, or lengths that do not add up.
        TypeError: a bias of another kind.
    """
    _check_shapes(query, key, value)
    if attn_bias is None or isinstance(attn_bias, Tensor):
        return _attend(query, key, value, attn_bias, p, scale).contiguous()
    if not isinstance(attn_bias, BlockDiagonalMask):
        raise TypeError(
            f"attn_bias must be None, a tensor or a BlockDiagonalMask, got {type(attn_bias).__name__}; this stand-in "
            "for xformers knows only what Open-Sora uses: install xformers for the rest"
        )
    q_lengths, kv_lengths = attn_bias.q_lengths, attn_bias.kv_lengths
    if query.shape[0] != 1 or sum(q_lengths) != query.shape[1] or sum(kv_lengths) != key.shape[1]:
        raise ValueError(
            f"a BlockDiagonalMask wants batch 1 and lengths that add up to the tokens: got batch {query.shape[0]}, "
            f"{query.shape[1]} query tokens for lengths {list(q_lengths)} (sum {sum(q_lengths)}) and {key.shape[1]} "
            f"key tokens for lengths {list(kv_lengths)} (sum {sum(kv_lengths)}); pack the sequences along axis 1"
        )
    # One call per sequence: no [Mq, Mk] mask is built, and nothing is computed that the mask would throw away.
    blocks = []
    for q, k, v in zip(query.split(q_lengths, 1), key.split(kv_lengths, 1), value.split(kv_lengths, 1), strict=True):
        if k.shape[1] == 0:
            blocks.append(q.new_zeros(*q.shape[:3], v.shape[3]))
        else:
            blocks.append(_attend(q, k, v, None, p, scale))
    return torch.cat(blocks, dim=1).contiguous()


def install() -> bool:
    if is_installed("xformers") and has_cuda():
        return False
    reason = "has no kernel for block diagonal masks without CUDA" if is_installed("xformers") else "is not installed"
    attention = {"memory_efficient_attention": memory_efficient_attention}
    mask = {"BlockDiagonalMask": BlockDiagonalMask}
    provide_modules(__name__, {"xformers": {}, "xformers.ops": attention, "xformers.ops.fmha": {**attention, **mask}})
    announce(NAME, f"xformers.ops now computes attention with torch, because xformers {reason}")
    return True
