"""Trainings of Open-Sora 2.0, as its scripts/diffusion/train.py would build them from a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.meta import largest, unloaded
from opensora_perflow.hosts.outline import Bucket, Outline
from opensora_perflow.hosts.v2.keys import read_config

PATCH = 2
ENCODERS = {"t5": "text encoder", "clip": "CLIP", "ae": "VAE"}
OURS = {"perflow_hunyuan_vae": "hunyuan_vae", "perflow_t5": "text_embedder", "perflow_clip": "text_embedder"}


def outline(config: Mapping[str, Any]) -> Outline:
    """The training of a config. Raises ValueError for keys of `perflow` that are wrong, and for a config without buckets."""
    if not config.get("bucket_config"):
        raise ValueError("the config has no bucket_config; name the config of a training, such as perflow_256px.py")
    model = dict(config["model"])
    recipe = read_config(model.pop("perflow", None))[0] if model.pop("type", None) == "perflow_flux" else None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.get("dtype", "bf16")]
    meta, adapted = dict(device="meta", dtype=dtype), config.get("lora_config") is not None
    told = recipe is not None and recipe.guidance.mode == "range"
    cached = {"ae": "cached_video", "t5": "cached_text", "clip": "cached_text"}
    with unloaded():
        network = _network({**model, "guidance_embed": model.get("guidance_embed", False) or told}, dtype, config)
        held = [part for part, key in cached.items() if part in config and not config.get(key)]
        held = [part for part in held if not config[part]["type"].startswith("perflow_encoded")]
        built = {part: meta_encoder(config[part], dtype) for part in held}
    vae, length = built.get("ae"), config.get("t5", {}).get("max_length", 512)
    width, pooled = model.get("context_in_dim", 4096), model.get("vec_in_dim", 768)

    def forward(bucket: Bucket, samples: int) -> Tensor:
        channels, frames, rows, columns = bucket.latent
        tokens = frames * rows * columns // PATCH**2
        inputs = {
            "img": (tokens, channels * PATCH**2), "img_ids": (tokens, 3), "txt": (length, width), "txt_ids": (length, 3),
            "timesteps": (), "y_vec": (pooled,), "cond": (tokens, (channels + 1) * PATCH**2), "guidance": (),
        }  # fmt: skip
        return network(**{name: torch.empty(samples, *shape, **meta) for name, shape in inputs.items()})

    def encode(bucket: Bucket) -> None:
        with torch.no_grad():
            vae.encoder(torch.empty(bucket.batch, 3, *bucket.pixels, **meta))

    encoders = {ENCODERS[part]: module for part, module in built.items()}
    plugin = config.get("plugin_config") or {}
    return Outline(
        network, encoders, _buckets(config), forward, None if vae is None else encode, recipe,
        adapters=adapted, checkpointing=bool(config.get("grad_checkpoint", True)), rows_together=True, ema_on_gpu=False,
        sharded_gradients=config.get("plugin") == "zero2" or plugin.get("zero_stage") == 2,
        sequence_parallel=plugin.get("sp_size", 1), tflops=450.0,
    )  # fmt: skip


def _network(model: Mapping[str, Any], dtype: torch.dtype, config: Mapping[str, Any]) -> nn.Module:
    from opensora.models.mmdit.model import Flux

    network = Flux(**{**model, "from_pretrained": None}, device_map="meta", torch_dtype=dtype).train()
    if config.get("lora_config") is None:
        return network
    from peft import LoraConfig, get_peft_model

    return get_peft_model(network, LoraConfig(**config["lora_config"])).to(dtype)


def meta_encoder(settings: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A text encoder or a VAE's encoder without weights; to be built inside meta.unloaded."""
    from opensora.registry import MODELS

    settings = {name: value for name, value in settings.items() if name != "shardformer"}
    settings["type"] = OURS.get(settings["type"], settings["type"])
    if settings["type"] == "text_embedder":
        model = MODELS.build({**settings, "device_map": "meta", "torch_dtype": dtype})
    else:
        model = MODELS.build({**settings, "from_pretrained": None, "device_map": "meta", "torch_dtype": dtype})
    if hasattr(model, "decoder"):
        del model.decoder  # as train.py does
    return model.to(dtype).eval().requires_grad_(False)


def _buckets(config: Mapping[str, Any]) -> list[Bucket]:
    from opensora.datasets.aspect import get_aspect_ratios_dict, get_num_pexels_from_name

    found, channels = [], config["model"].get("in_channels", 64) // PATCH**2
    ae = config.get("ae") or {}
    space, time = ae.get("spatial_compression_ratio", 8), ae.get("time_compression_ratio", 4)
    for name, lengths in config["bucket_config"].items():
        height, width = largest(list(get_aspect_ratios_dict(get_num_pexels_from_name(name)).values()))
        for frames, shares in lengths.items():
            latent = (channels, (frames - 1) // time + 1, height // space, width // space)
            found.append(Bucket(f"{name} x {frames}", shares[1], (frames, height, width), latent))
    return found
