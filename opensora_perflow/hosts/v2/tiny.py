"""Small stand-ins for Open-Sora 2.0's text encoders and VAE, so that its real scripts run on a laptop.

Importing this module registers "perflow_tiny_t5", "perflow_tiny_clip" and "perflow_tiny_hunyuan_vae" in the host's MODELS. A
config names them like the host's own; the network is the host's, whose config says its size:

    custom_imports = dict(imports=["opensora_perflow.hosts.v2.tiny"], allow_failed_imports=False)
    model = dict(type="flux", in_channels=64, vec_in_dim=16, context_in_dim=32, hidden_size=96, num_heads=4, ...)
    ae = dict(type="perflow_tiny_hunyuan_vae")
    t5 = dict(type="perflow_tiny_t5", output_dim=32)
    clip = dict(type="perflow_tiny_clip", output_dim=16)

Words have the vectors of the demo's text encoder. The VAE is the host's own class with few channels and random weights: shapes
are right, pictures are not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.v2.text import noting_null
from opensora_perflow.worlds.text import TinyTextEncoder

try:
    from opensora.models.hunyuan_vae.autoencoder_kl_causal_3d import AutoEncoder3DConfig, AutoencoderKLCausal3D
    from opensora.models.text.conditioner import HFEmbedder
    from opensora.registry import MODELS
except ImportError as error:
    raise ImportError(
        "opensora_perflow.hosts.v2.tiny registers stand-ins in the MODELS of Open-Sora 2.0, whose modules cannot be imported "
        f"({error}); run the script through `python -m opensora_perflow.run ROOT/scripts/diffusion/...`, or put a checkout of "
        "hpcaitech/Open-Sora's main branch on PYTHONPATH"
    ) from error


class TinyEmbedder(HFEmbedder):
    """The demo's text encoder as one of the host's.

    Args:
        max_length: L, tokens of a text, >= 2; longer texts are cut. 16 hold a caption of the demo and what the host adds to it.
        output_dim: D, size of a word vector, >= 1. The network calls it context_in_dim (T5) or vec_in_dim (CLIP).
        pooled: Whether to answer as CLIP does, with one vector a text: the mean of the vectors of its words and end token.
        device, dtype: Of the answers.
    """

    def __init__(self, max_length: int, output_dim: int, pooled: bool, device: Any, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # the host's own constructor loads a model of transformers
        self.is_clip = pooled
        self.max_length = max_length
        self.encoder = TinyTextEncoder(max_length, output_dim, device=device, dtype=dtype)

    def forward(self, text: str | list[str], added_tokens: int = 0, seq_align: int = 1) -> Tensor:
        """Texts -> [B, L, D], or [B, D] if pooled; one str counts as a batch of one.

        As the host's, L grows until `added_tokens` + L is a multiple of `seq_align`. Padding is zeros.
        """
        tokens = self.encoder.tokenize_fn(text)
        words = self.encoder.encode(**tokens)["y"][:, 0]
        if self.is_clip:
            return words.sum(1) / tokens["attention_mask"].sum(1, keepdim=True).to(words)
        return nn.functional.pad(words, (0, 0, 0, -(added_tokens + words.shape[1]) % seq_align))


@MODELS.register_module("perflow_tiny_t5")
def tiny_t5(
    from_pretrained: str | None = None,
    max_length: int = 16,
    output_dim: int = 32,
    device_map: Any = "cpu",
    torch_dtype: torch.dtype = torch.bfloat16,
    **kwargs: Any,
) -> TinyEmbedder:
    """The demo's text encoder as the host's T5; `from_pretrained` and kwargs (shardformer, cache_dir) are taken and ignored."""
    return noting_null(TinyEmbedder(max_length, output_dim, False, device_map, torch_dtype), "txt")


@MODELS.register_module("perflow_tiny_clip")
def tiny_clip(
    from_pretrained: str | None = None,
    max_length: int = 16,
    output_dim: int = 16,
    device_map: Any = "cpu",
    torch_dtype: torch.dtype = torch.bfloat16,
    **kwargs: Any,
) -> TinyEmbedder:
    """The demo's text encoder as the host's CLIP; arguments as `tiny_t5`."""
    return noting_null(TinyEmbedder(max_length, output_dim, True, device_map, torch_dtype), "y_vec")


class TinyHunyuanVAE(AutoencoderKLCausal3D):
    """The host's causal video VAE in float32: half-precision convolutions take seconds on a CPU.

    T frames of H x W give 16 channels of (T - 1) // 4 + 1 frames of ceil(H / 8) x ceil(W / 8).
    """

    def __init__(self, config: AutoEncoder3DConfig) -> None:
        super().__init__(config)
        self.cfg = config  # the host's visual conditions read it, and its own class has none (utils/train.py:202, 330)

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the host's, in and out in x's dtype."""
        return super().encode(x.float(), *args, **kwargs).to(x.dtype)

    def decode(self, z: Tensor) -> Tensor:
        """As the host's, in and out in z's dtype."""
        return super().decode(z.float()).to(z.dtype)


@MODELS.register_module("perflow_tiny_hunyuan_vae")
def tiny_hunyuan_vae(
    from_pretrained: str | None = None,
    device_map: Any = "cpu",
    torch_dtype: torch.dtype = torch.bfloat16,
    **kwargs: Any,
) -> TinyHunyuanVAE:
    """The host's hunyuan_vae with 8 to 16 channels and the same random weights in every process.

    Args:
        from_pretrained, torch_dtype: Taken and ignored.
        kwargs: What AutoEncoder3DConfig knows.
    """
    sizes = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = TinyHunyuanVAE(AutoEncoder3DConfig(from_pretrained=None, **{**sizes, **kwargs}))
    return vae.to(device_map)


__all__ = ["TinyEmbedder", "TinyHunyuanVAE", "tiny_clip", "tiny_hunyuan_vae", "tiny_t5"]
