"""Open-Sora's timestep transform: the ratio by which time is warped for large and long videos."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

BASE_RESOLUTION = 512 * 512


def installed_formula() -> str:
    """The formula of the Open-Sora that is installed: "v1.3" or "v1.2" (also where none is)."""
    # v1.3 moved the transform into a module of its own and changed its count of latent frames on the way.
    if find_spec("opensora") is None:
        return "v1.2"
    try:
        return "v1.3" if find_spec("opensora.schedulers.rf.time_sampler") is not None else "v1.2"
    except ModuleNotFoundError:  # Open-Sora 1.0, 1.1: no rectified flow at all
        return "v1.2"


def is_image(model_args: Mapping[str, Any]) -> bool:
    """A batch is homogeneous: its first sample's frame count says whether it holds images."""
    return bool(model_args["num_frames"][0] == 1)


def shift_ratio(model_args: Mapping[str, Any], formula: str, *, scale: float = 1.0, scale_temporal: bool = True) -> Tensor:
    """Ratio r of `conventions.shift_time` for each sample: sqrt(height width / 512^2) sqrt(latent frames) scale.

    Args:
        model_args: Holds height, width, num_frames (pixels and pixel frames), each [B].
        formula: "v1.2": num_frames // 17 * 5 latent frames, `scale` for images too; "v1.3": (num_frames - 1) // 4, `scale`
            for videos only. One latent frame for an image, and if `scale_temporal` is False.

    Returns:
        [B], float64. The product and the roots are taken in the precision of the arguments (bfloat16 in training), as the host
        does. The student is sampled with the same rounding. float16, which overflows, is lifted to float32.

    Raises:
        ValueError: an argument is missing, or a video is too short to have a latent frame under the formula.

    Source: v1.2.0 opensora/schedulers/rf/rectified_flow.py and v1.3 opensora/schedulers/rf/time_sampler.py,
    timestep_transform.
    """
    missing = [key for key in ("height", "width", "num_frames") if model_args.get(key) is None]
    if missing:
        raise ValueError(
            f"use_timestep_transform needs height, width and num_frames with every batch, missing: {', '.join(missing)}; "
            'for inference set multi_resolution="STDiT2", for training use dataset type "VariableVideoTextDataset"'
        )
    height, width, num_frames = (_lift(model_args[key]) for key in ("height", "width", "num_frames"))
    ratio = (height * width / BASE_RESOLUTION).sqrt()
    image = is_image(model_args)
    if not image and scale_temporal:
        latent_frames = num_frames // 17 * 5 if formula == "v1.2" else (num_frames - 1) // 4
        if bool((latent_frames < 1).any()):
            raise ValueError(
                f"the {formula} timestep transform counts no latent frame in a video of {num_frames.min().item():g} frames; "
                f"use at least {17 if formula == 'v1.2' else 5} frames, or use_timestep_transform=False"
            )
        ratio = ratio * latent_frames.sqrt()
    # v1.3 without scale_temporal treats everything as an image, its scale included.
    if formula == "v1.2" or not (image or not scale_temporal):
        ratio = ratio * scale
    return ratio.to(torch.float64)


def _lift(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.float16 else value
