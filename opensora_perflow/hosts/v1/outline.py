"""Trainings of Open-Sora 1.0 to 1.3, as their scripts/train.py would build them from a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.meta import largest, numbers_read_as, unloaded
from opensora_perflow.hosts.outline import Bucket, Outline
from opensora_perflow.hosts.v1.keys import read_config
from opensora_perflow.hosts.v1.lora import KEYS, LoRA, add_adapters, is_meant
from opensora_perflow.hosts.v1.network import Interface

ENCODED, LATENTS = "perflow_encoded", "perflow_latents"
"""Types of what was encoded beforehand, see hosts/stored.py: nothing is held."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def outline(config: Mapping[str, Any]) -> Outline:
    """The training of a config.

    Raises:
        ValueError: keys of the scheduler or the adapters that are wrong, or no size of the videos.
    """
    scheduler = dict(config.get("scheduler") or {})
    recipe = None
    if scheduler.pop("type", None) == "perflow":
        recipe = read_config(scheduler)[0]
    dtype = DTYPES[config.get("dtype", "bf16")]
    with unloaded():
        text, vae = _text_encoder(config), _vae(config.get("vae"))
        channels = config.get("vae_out_channels", (config.get("vae") or {}).get("out_channels", 4))
        channels = channels if vae is None else vae.out_channels
        given = (config.get("vae") or {}).get("type") == LATENTS  # of the shape that the version's own VAE would give
        buckets = _buckets(config, _vae(dict(_own_vae(), micro_frame_size=17)) if given else vae, channels)
        network = _network(config, text, buckets[0].latent, dtype)
        network = network.to("meta", dtype).train()  # tables from numpy are on the CPU
    for module in network.modules():  # the draw needs CUDA, and keeps nothing
        if hasattr(module, "uncond_prob"):
            module.uncond_prob = 0.0
    tokens, features = (getattr(text, name, default) for name, default in (("model_max_length", 300), ("output_dim", 4096)))

    def forward(bucket: Bucket, samples: int) -> Tensor:
        meta = dict(device="meta", dtype=dtype)
        x, y = torch.empty(samples, *bucket.latent, **meta), torch.empty(samples, 1, tokens, features, **meta)
        _, height, width = bucket.pixels
        told = {name: torch.empty(samples, device="meta") for name in ("height", "width", "num_frames", "ar", "fps")}
        with numbers_read_as((height * width) ** 0.5):
            return network(x, torch.zeros(samples, device="meta"), y, **Interface.of(network).accepted(told))

    encoders = {"text encoder": getattr(getattr(text, "t5", None), "model", text), "VAE": vae}
    encoders = {name: module.to(dtype) for name, module in encoders.items() if isinstance(module, nn.Module)}
    return Outline(
        network, encoders, buckets, forward, None if vae is None else lambda bucket: _encode(vae, bucket, dtype), recipe,
        adapters=is_meant(config), checkpointing=bool(config.get("grad_checkpoint")), rows_together=False, ema_on_gpu=True,
        sharded_gradients="zero2" in config.get("plugin", "zero2"), sequence_parallel=config.get("sp_size", 1), tflops=175.0,
    )  # fmt: skip


def _text_encoder(config: Mapping[str, Any]) -> Any:
    from opensora.registry import MODELS

    settings = config.get("text_encoder")
    if settings is None or settings["type"] == ENCODED:
        return None
    settings = {name: value for name, value in settings.items() if name not in ("shardformer", "cache_dir")}
    if settings.get("type") == "t5":
        settings["from_pretrained"] = "DeepFloyd/t5-v1_1-xxl"  # the one that the host takes by name
    return MODELS.build({**settings, "device": "meta"})


def _own_vae() -> dict[str, Any]:
    """The VAE of this version, 1.2 or 1.3, as its configs have it."""
    from opensora.registry import MODELS

    if MODELS.get("OpenSoraVAE_V1_3") is None:
        return {"type": "OpenSoraVAE_V1_2"}
    return {"type": "OpenSoraVAE_V1_3", "z_channels": 16, "normalization": "video", "temporal_overlap": True}


def _vae(settings: Mapping[str, Any] | None) -> nn.Module | None:
    from opensora.registry import MODELS

    if settings is None or settings["type"] == LATENTS:
        return None
    settings = dict(settings)
    if settings["type"].startswith("OpenSoraVAE"):
        settings |= {"from_pretrained": None} | ({"force_huggingface": False} if "force_huggingface" in settings else {})
    elif "from_pretrained" not in settings:
        settings["from_pretrained"] = None
    return MODELS.build(settings)


def _network(config: Mapping[str, Any], text: Any, latent: tuple[int, ...], dtype: torch.dtype) -> nn.Module:
    from opensora import registry

    model, adapters = dict(config["model"]), None
    if is_meant(config):
        adapters = LoRA(**{name: model[name] for name in KEYS if model.get(name) is not None})
        own = {name: value for name, value in model.items() if name not in (*KEYS, "type", "base")}
        model = {**model["base"], **own}
    fixed = "image_size" in config and not config.get("bucket_config")
    given = dict(
        from_pretrained=None, in_channels=latent[0], input_size=latent[1:] if fixed else (None, None, None),
        caption_channels=getattr(text, "output_dim", 4096), model_max_length=getattr(text, "model_max_length", 300),
    )  # fmt: skip
    if not hasattr(registry, "DATASETS"):  # 1.0, whose network casts to what it was told
        given["dtype"] = dtype
    # A kernel of apex keeps what torch's layer norm keeps.
    network = registry.MODELS.build({**model, **given, "enable_layernorm_kernel": False})
    return network if adapters is None else add_adapters(network, adapters)


def _buckets(config: Mapping[str, Any], vae: nn.Module | None, channels: int) -> list[Bucket]:
    def bucket(name: str, batch: int, frames: int, size: tuple[int, int]) -> Bucket:
        latent = [frames, size[0] // 8, size[1] // 8] if vae is None else vae.get_latent_size([frames, *size])
        return Bucket(f"{name} x {frames}", batch, (frames, *size), (channels, *latent))

    if config.get("bucket_config"):
        from opensora.datasets.aspect import ASPECT_RATIOS

        return [
            bucket(name, shares[1], frames, largest(list(ASPECT_RATIOS[name][1].values())))
            for name, lengths in config["bucket_config"].items()
            for frames, shares in lengths.items()
            if shares[1] is not None
        ]
    size, frames = config.get("image_size"), config.get("num_frames")
    if size is None or frames is None:
        raise ValueError("the config says no size of its videos: no bucket_config, and no image_size with num_frames")
    return [bucket(f"{size[0]} x {size[1]}", config.get("batch_size") or 1, frames, tuple(size))]


def _encode(vae: nn.Module, bucket: Bucket, dtype: torch.dtype) -> None:
    with torch.no_grad():
        vae.encode(torch.empty(bucket.batch, 3, *bucket.pixels, device="meta", dtype=dtype))
