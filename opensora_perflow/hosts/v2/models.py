"""What Open-Sora 2.0 builds by name: perflow_flux, perflow_t5, perflow_clip, perflow_hunyuan_vae, and encoded
texts (encoded_text.py).

Each builds Open-Sora's own model and adds to that one object. Open-Sora's own names stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmengine.registry import Registry
from torch import nn

from opensora_perflow.hosts.script import main_variable
from opensora_perflow.hosts.v2.averages import copy_in_float32
from opensora_perflow.hosts.v2.denoiser import step_students
from opensora_perflow.hosts.v2.encoded_text import perflow_encoded_clip, perflow_encoded_t5
from opensora_perflow.hosts.v2.flux import PeRFlowFlux
from opensora_perflow.hosts.v2.text import noting_null
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.state import find_state
from opensora_perflow.training.teacher import load_teacher


def perflow_flux(perflow: Mapping[str, Any] | None = None, **settings: Any) -> nn.Module:
    """Open-Sora's `flux` as a PeRFlow student: trained by train.py, sampled by inference.py.

    Args:
        perflow: The keys of hooks, see keys.read_config.
        settings: What `flux` takes.
    """
    hooks, config = PeRFlowFlux(perflow), main_variable("cfg") or {}
    trains = config.get("optim") is not None
    network = flux_of(hooks.recipe if trains else hooks.settings.recipe, settings, trains=trains)
    source, stored = hooks.recipe.teacher.from_pretrained, hooks.recipe.teacher.stored
    if trains and stored is None and (source is not None or config.get("lora_config") is None):
        # Here, as later weights may be loaded (--load) or split over processes, whose groups cannot be copied.
        hooks.host.built = load_teacher(network, source, hooks.host.weights)
    if trains and config.get("ema_decay") is not None and config.get("lora_config") is None:
        copy_in_float32(network)
    step_students(hooks)
    return hooks.attach(network)


def flux_of(recipe: Recipe, settings: Mapping[str, Any], *, trains: bool) -> nn.Module:
    """Open-Sora's `flux`, which in mode range is told a scale. In training new weights for a scale are zeros."""
    from opensora.models.mmdit.model import Flux

    told = recipe.guidance.mode == "range"
    network = Flux(**{**settings, "guidance_embed": True} if told else settings)
    if told and trains and not _was_told(settings.get("from_pretrained")):
        # A scale changes nothing before it was trained.
        nn.init.zeros_(network.guidance_in.out_layer.weight)
        nn.init.zeros_(network.guidance_in.out_layer.bias)
    return network


def _was_told(weights: str | None) -> bool:
    """Are these the weights of a student that was trained with scales?"""
    found = None if weights is None else find_state(weights)
    return found is not None and found[0].guidance.get("mode") == "range"


def perflow_t5(**settings: Any) -> nn.Module:
    """Open-Sora's `text_embedder` of T5, which notes the embedding of the empty prompt."""
    return noting_null(_text_embedder(settings), "txt")


def perflow_clip(**settings: Any) -> nn.Module:
    """Open-Sora's `text_embedder` of CLIP, which notes the embedding of the empty prompt."""
    return noting_null(_text_embedder(settings), "y_vec")


def _text_embedder(settings: Mapping[str, Any]) -> nn.Module:
    from opensora.models.text.conditioner import HFEmbedder

    return HFEmbedder(**settings)


def perflow_hunyuan_vae(**settings: Any) -> nn.Module:
    """Open-Sora's `hunyuan_vae` with the attribute `cfg` that its image-to-video training reads (utils/train.py:202)."""
    from opensora.models.hunyuan_vae.autoencoder_kl_causal_3d import AutoEncoder3DConfig, CausalVAE3D_HUNYUAN

    vae = CausalVAE3D_HUNYUAN(**settings)
    own = {name: value for name, value in settings.items() if name not in ("device_map", "torch_dtype")}
    vae.cfg = AutoEncoder3DConfig(**{"from_pretrained": None, **own})
    return vae


FACTORIES: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (perflow_flux, perflow_t5, perflow_clip, perflow_hunyuan_vae, perflow_encoded_t5, perflow_encoded_clip)
}


def register(models: Registry) -> None:
    """Enter the factories in the host's MODELS, once."""
    for name, factory in FACTORIES.items():
        if name not in models.module_dict:
            models.register_module(name=name, module=factory)
