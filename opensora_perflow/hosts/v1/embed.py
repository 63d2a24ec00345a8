"""`opensora-perflow embed`: a prompt through the text encoder of an Open-Sora config, to a file for guidance.negative."""

from pathlib import Path
from typing import Any

import torch

from opensora_perflow import portable
from opensora_perflow.hosts.script import cannot_import, read_host_config, refuse_no_config, use_checkout
from opensora_perflow.hosts.v1.negative_text import write_negative


def embed(config: Path, prompt: str, out: Path, open_sora: Path | None = None) -> None:
    """Write what the text encoder of `config` makes of `prompt` to `out` (.safetensors).

    Args:
        config: A training config of Open-Sora's; its text_encoder is built as Open-Sora's inference does: in float32, on a GPU
            if there is one. T5-XXL has 4.7 B parameters.
        prompt: The negative prompt, as it is: Open-Sora's scripts clean prompts before they encode them.
        out: File to write.
        open_sora: Checkout that `opensora` is imported from; None: the installed one.

    Raises:
        ValueError: no Open-Sora, no such config, a config without text_encoder, another suffix.
    """
    if out.suffix != ".safetensors":  # before a text encoder of 19 GB is loaded
        raise ValueError(f"--out must end in .safetensors, got {str(out)!r}")
    write_negative(out, _text_encoder(config, open_sora), prompt)


def _text_encoder(config: Path, open_sora: Path | None) -> Any:
    refuse_no_config(config)
    use_checkout(open_sora, "1.x")
    portable.activate()
    try:
        from opensora import registry
    except ImportError as error:
        raise cannot_import(error) from error

    settings = read_host_config(config, is_v2=not hasattr(registry, "SCHEDULERS")).get("text_encoder")
    if not isinstance(settings, dict) or "type" not in settings:
        raise ValueError(f"{str(config)!r} has no text_encoder; name the config that the student will be trained with")
    settings = {name: value for name, value in settings.items() if name != "shardformer"}  # for training in many processes
    return registry.build_module(settings, registry.MODELS, device="cuda" if torch.cuda.is_available() else "cpu")
