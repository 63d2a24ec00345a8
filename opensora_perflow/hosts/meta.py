"""Open-Sora's models without weights: its own classes on torch's meta device, with attention as its fused kernels keep it.

Nothing is computed and nothing is fetched there, so a laptop can build 11.9 B parameters. A process that has called `prepare`
cannot train: its kernels compute nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_perflow.portable.imports import provide_modules
from opensora_perflow.portable.xformers_attention import BlockDiagonalMask

T5_XXL = dict(
    vocab_size=32128, d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu",
    is_encoder_decoder=False, use_cache=False,
)  # fmt: skip
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
SD_VAE = dict(
    in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
)  # fmt: skip
"""What the published weights that Open-Sora's configs name say of themselves."""

attention_flops = 0
"""Of the fused attention of this process so far; torch's own counter does not see it."""


class _Attention(torch.autograd.Function):
    """What flash-attn and xformers keep for the backward: inputs, output, and a float32 a query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pairs: int) -> Tensor:
        """q, k, v: [..., heads, width] or any order of axes; pairs: Of query and key, over batch and heads."""
        global attention_flops
        attention_flops += 2 * pairs * (q.shape[-1] + v.shape[-1])
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        raise NotImplementedError("a network on the meta device has no gradients")


class _RMSNorm(torch.autograd.Function):
    """What Liger's kernel keeps: the input, the weight, and a float32 a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    backward = _Attention.backward


class _Rope(torch.autograd.Function):
    """What Liger's kernel keeps: the angles. It turns q and k in place."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return torch.empty_like(q), torch.empty_like(k)

    backward = _Attention.backward


def _flash(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[B, L, H, D]."""
    return _Attention.apply(q, k, v, q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1])


def _memory_efficient(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, **kwargs: Any) -> Tensor:
    """[B, L, H, D], or sequences packed along L."""
    if not isinstance(attn_bias, BlockDiagonalMask):
        return _flash(q, k, v)
    lengths = zip(attn_bias.q_lengths, attn_bias.kv_lengths)
    return _Attention.apply(q, k, v, q.shape[2] * sum(queries * keys for queries, keys in lengths))


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[..., L, D]."""
    return _Attention.apply(q, k, v, q.shape[:-1].numel() * k.shape[-2])


def prepare() -> None:
    """Put stand-ins that compute nothing in place of fused kernels, also where the real ones are installed.

    Call it before anything of Open-Sora's models is imported.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled for meta
    ops = {"memory_efficient_attention": _memory_efficient, "BlockDiagonalMask": BlockDiagonalMask}
    nothing = {"_flash_attn_forward": None, "_flash_attn_backward": None}
    liger = {"rms_norm": {"LigerRMSNormFunction": _RMSNorm}, "rope": {"LigerRopeFunction": _Rope}}
    provide_modules(
        __name__,
        {
            "xformers": {}, "xformers.ops": ops, "xformers.ops.fmha": ops, "flash_attn": {"flash_attn_func": _flash},
            "flash_attn.flash_attn_interface": nothing, "liger_kernel": {}, "liger_kernel.ops": {},
            **{f"liger_kernel.ops.{name}": names for name, names in liger.items()},
        },
    )  # fmt: skip
    F.scaled_dot_product_attention = _scaled_dot_product


class _Tokenizer:
    """What the host's encoders keep of a tokenizer."""

    pad_token_id = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a text encoder on the meta device reads no text")


@contextmanager
def unloaded() -> Iterator[None]:
    """While it lasts, modules are built on the meta device, and names of published weights give their architecture."""
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    def of(make: Callable[[], Any]) -> classmethod:
        return classmethod(lambda cls, *args, **kwargs: make())

    architectures = {
        T5EncoderModel: of(lambda: T5EncoderModel(T5Config(**T5_XXL))),
        CLIPTextModel: of(lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L))),
        AutoencoderKL: of(lambda: AutoencoderKL(**SD_VAE)),
        **dict.fromkeys((AutoTokenizer, CLIPTokenizer, T5Tokenizer), of(_Tokenizer)),
    }
    linspace = torch.linspace
    with ExitStack() as stack:
        for cls, from_pretrained in architectures.items():
            stack.enter_context(patch.object(cls, "from_pretrained", from_pretrained))
        # drop_path's rates are read as numbers
        stack.enter_context(patch.object(torch, "linspace", lambda *a, **k: linspace(*a, **{**k, "device": "cpu"})))
        stack.enter_context(torch.device("meta"))
        yield


@contextmanager
def numbers_read_as(value: float) -> Iterator[None]:
    """While it lasts, a number that is read from the meta device is this one: networks read the size of a video."""
    item = Tensor.item
    with patch.object(Tensor, "item", lambda tensor: value if tensor.is_meta else item(tensor)):
        yield


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def checkpointed(run: Callable[..., Any]) -> ExitStack:
    """While it lasts, `run(module, *inputs)` is what Open-Sora's models call where they may checkpoint gradients."""
    stack = ExitStack()
    for name, module in list(sys.modules.items()):
        if name.startswith("opensora.models.") and hasattr(module, "auto_grad_checkpoint"):
            stack.enter_context(patch.object(module, "auto_grad_checkpoint", run))
    return stack


def largest(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of the largest area."""
    return max(sizes, key=lambda size: size[0] * size[1])
