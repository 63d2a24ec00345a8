"""Guidance: how predictions under several conditions are combined into one. All are linear, so signs do not matter."""

import torch
from torch import Tensor


def classifier_free(v_cond: Tensor, v_uncond: Tensor, scale: float | Tensor) -> Tensor:
    """v_uncond + scale (v_cond - v_uncond). Source: arXiv:2207.12598, eq. 6 in the form with scale 1 = no guidance."""
    return v_uncond + scale * (v_cond - v_uncond)


def text_and_image(
    v_full: Tensor, v_image: Tensor, v_none: Tensor, text_scale: float | Tensor, image_scale: float | Tensor
) -> Tensor:
    """Guidance by text and by reference frames: v_none + image_scale (v_image - v_none) + text_scale (v_full - v_image).

    Source: InstructPix2Pix (arXiv:2211.09800), eq. 3, in the order in which Open-Sora 1.3 nests it.
    """
    return v_none + image_scale * (v_image - v_none) + text_scale * (v_full - v_image)


def draw_scales(
    low: float,
    high: float,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Scales uniform on [low, high), one a sample: [B], float64.

    Source: Meng et al. (arXiv:2210.03142), section 3.1: a student of a guided teacher for a range of scales.
    """
    return low + (high - low) * torch.rand(batch_size, dtype=torch.float64, device=device, generator=generator)


def oscillating_scale(scale: float, step: int, force_num: int) -> float:
    """The scale on the first `force_num` steps and on every even one after; 1 (no guidance) on the odd ones.

    Source: Open-Sora 1.3 opensora/schedulers/rf/__init__.py, use_oscillation_guidance.
    """
    return scale if step < force_num or step % 2 == 0 else 1.0


def rescale_to_cond(v: Tensor, v_cond: Tensor, strength: float = 0.7) -> Tensor:
    """Pull the standard deviation of a guided prediction back towards that of the conditional one, per sample.

    Source: arXiv:2305.08891, section 3.4; strength 0.7 as in Open-Sora 1.3's use_flaw_fix.
    """
    dims = list(range(1, v.dim()))
    factor = v_cond.std(dim=dims, keepdim=True) / v.std(dim=dims, keepdim=True)
    return v * (strength * factor + (1.0 - strength))


def image_scale_ramp(scale: float, initial: float, step: int, num_steps: int, num_frames: int) -> Tensor:
    """Image guidance that decays over the steps towards `initial` and grows over the frames from it: [1, 1, T, 1, 1].

    Source: Open-Sora 1.3 opensora/schedulers/rf/__init__.py, scale_image_weight.
    """
    upper = torch.linspace(scale, initial, num_steps)[step].item()
    return torch.linspace(initial, upper, num_frames).reshape(1, 1, -1, 1, 1)
