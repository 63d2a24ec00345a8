"""What the tests of Open-Sora 2.0's real scripts share beside _harness: configs small enough for a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _harness import Clips, write_config

TINY_FLUX: dict[str, Any] = {
    "type": "flux",
    "from_pretrained": None,
    "strict_load": False,
    "guidance_embed": False,
    "fused_qkv": False,
    "use_liger_rope": True,
    "in_channels": 64,
    "vec_in_dim": 16,
    "context_in_dim": 32,
    "hidden_size": 96,
    "mlp_ratio": 4.0,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 8, 8],
    "theta": 10_000,
    "qkv_bias": True,
    "cond_embed": True,
}
"""The released model's settings in another size: 1.0 M parameters."""

ENCODERS: dict[str, Any] = {
    "custom_imports": {"imports": ["opensora_perflow.hosts.v2.tiny"], "allow_failed_imports": False},
    "ae": {"type": "perflow_tiny_hunyuan_vae"},
    "t5": {"type": "perflow_tiny_t5", "output_dim": TINY_FLUX["context_in_dim"]},
    "clip": {"type": "perflow_tiny_clip", "output_dim": TINY_FLUX["vec_in_dim"]},
}


def train_config_v2(path: Path, clips: Clips, outputs: Path, **overrides: Any) -> Path:
    """Write a config of scripts/diffusion/train.py: two 64 x 64 x 9 clips a step, one epoch, a checkpoint every two steps.

    Args:
        overrides: Further or other top-level keys; `model` is merged into TINY_FLUX.
    """
    settings = {
        **ENCODERS,
        "dataset": {"type": "video_text", "transform_name": "resize_crop", "fps_max": 24, "data_path": str(clips.csv)},
        "bucket_config": {"64px": {9: (1.0, 2)}},
        "is_causal_vae": True,
        "condition_config": {"t2v": 1},
        "optim": {"cls": "HybridAdam", "lr": 1e-3, "eps": 1e-15, "weight_decay": 0.0, "adamw_mode": True},
        "warmup_steps": 0,
        "update_warmup_steps": True,
        "grad_clip": 1.0,
        "num_workers": 0,
        "dtype": "bf16",
        "plugin": "zero2",
        "plugin_config": {"reduce_bucket_size_in_m": 1, "overlap_allgather": False},
        "grad_checkpoint": True,
        "seed": 42,
        "outputs": str(outputs),
        "epochs": 1,
        "log_every": 1,
        "ckpt_every": 2,
        **overrides,
        "model": {**TINY_FLUX, **overrides.get("model", {})},
    }
    return write_config(path, settings)


def inference_config_v2(
    path: Path, checkpoint: Path, save_dir: Path, sampling_option: Mapping[str, Any] | None = None, **overrides: Any
) -> Path:
    """Write a config of scripts/diffusion/inference.py: one 64 x 64 x 9 sample in four steps.

    Args:
        checkpoint: A folder that train.py wrote.
        sampling_option: Further or other keys of the host's option of that name.
        overrides: Further or other top-level keys; `model` is merged into TINY_FLUX.
    """
    option = {
        "resolution": "64px",
        "aspect_ratio": "1:1",
        "num_frames": 9,
        "num_steps": 4,
        "shift": True,
        "temporal_reduction": 4,
        "is_causal_vae": True,
        "guidance": 7.5,
        "guidance_img": 3.0,
        "text_osci": True,
        "image_osci": True,
        "scale_temporal_osci": True,
        "method": "i2v",
        "seed": 7,
        **(sampling_option or {}),
    }
    settings = {
        **ENCODERS,
        "dataset": {"type": "text"},
        "prompt": "a red circle moving right",
        "cond_type": "t2v",
        "sampling_option": option,
        "motion_score": "4",
        "fps_save": 24,
        "plugin": None,
        "batch_size": 1,
        "num_workers": 0,
        "dtype": "bf16",
        "seed": 42,
        "save_dir": str(save_dir),
        **overrides,
        "model": {**TINY_FLUX, "from_pretrained": str(checkpoint), **overrides.get("model", {})},
    }
    return write_config(path, settings)
