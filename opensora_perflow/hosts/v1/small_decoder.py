"""Open-Sora's VAE with a small decoder of frames: after four evaluations, decoding is half of what a user waits for.

The VAEs of Open-Sora 1.1 and 1.2 decode each frame by a KL autoencoder of Stable Diffusion. diffusers' AutoencoderTiny (TAESD,
TAESDXL) takes the same latents. The temporal half of 1.2's VAE stays. Costs are in benchmarks/end_to_end.py; quality was not
measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import Registry
from torch import Tensor, nn

from opensora_perflow.checks import shown

NAME = "perflow_small_decoder"
HOST_SCALE = 0.18215
"""Open-Sora's latents are an autoencoder's times this, whatever the autoencoder's own scale (models/vae/vae.py)."""
EXAMPLE = f'vae=dict(type="{NAME}", base=dict(type="OpenSoraVAE_V1_2", ...), decoder="madebyollin/taesdxl")'


def perflow_small_decoder(base: Mapping[str, Any] | None = None, decoder: str | os.PathLike | None = None) -> nn.Module:
    """A VAE of the host that decodes frames by an AutoencoderTiny. Encoding stays as it was.

    Args:
        base: The VAE's own config: of VideoAutoencoderKL (1.1) or OpenSoraVAE_V1_2.
        decoder: A folder or name of diffusers' AutoencoderTiny: madebyollin/taesdxl for 1.2, madebyollin/taesd for 1.1.

    Raises:
        ValueError: no base, no decoder, or a VAE that has no KL autoencoder of frames (that of 1.3).
    """
    if not isinstance(base, Mapping) or "type" not in base or decoder is None:
        raise ValueError(f"{NAME} needs a VAE and a decoder, got base={shown(base)}, decoder={shown(decoder)}; write {EXAMPLE}")
    from diffusers import AutoencoderTiny
    from opensora.registry import MODELS

    return with_small_decoder(MODELS.build(dict(base)), AutoencoderTiny.from_pretrained(decoder))


def with_small_decoder(vae: nn.Module, small: nn.Module) -> nn.Module:
    """The VAE itself; what decoded its frames until now is dropped.

    Args:
        vae: The host's. small: An AutoencoderTiny.
    """
    spatial = getattr(vae, "spatial_vae", vae)
    autoencoder = getattr(spatial, "module", None)
    if not hasattr(autoencoder, "decoder") or not hasattr(getattr(autoencoder, "config", None), "scaling_factor"):
        raise ValueError(
            f"{NAME} takes the place of a KL autoencoder's decoder, and {type(vae).__name__} has none; it is for Open-Sora 1.1 "
            f"and 1.2: {EXAMPLE}"
        )
    factor = autoencoder.config.scaling_factor / HOST_SCALE
    autoencoder.decoder, autoencoder.post_quant_conv = nn.Identity(), nn.Identity()
    spatial.small = small.eval().requires_grad_(False)

    @torch.no_grad()
    def decode(x: Tensor, **_: Any) -> Tensor:
        """Latents [B, C, T, h, w] -> frames [B, 3, T, H, W] in -1..1."""
        frames = (x * factor).transpose(1, 2).flatten(0, 1)
        decoded = torch.cat([small.decode(part).sample for part in frames.split(spatial.micro_batch_size or len(frames))])
        return decoded.unflatten(0, (len(x), -1)).transpose(1, 2)

    spatial.decode = decode
    return vae


def register(models: Registry) -> None:
    """Enter the factory in the host's MODELS, once."""
    if NAME not in models.module_dict:
        models.register_module(name=NAME, module=perflow_small_decoder)
