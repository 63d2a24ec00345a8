"""What the running host script was told: whether it resumes, and where its weights came from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora_perflow.hosts.script import main_variable
from opensora_perflow.training.state import find_state


def running_config() -> Mapping[str, Any] | None:
    """The config of the Open-Sora script that is calling, or None when called from elsewhere."""
    return main_variable("cfg")


def model_settings() -> dict[str, Any]:
    """The model section of the running script's config; of perflow_lora with what its `base` says besides."""
    model = (running_config() or {}).get("model") or {}
    return {**(model.get("base") or {}), **model}


def loaded_weights() -> str | None:
    """Where the running script's network got its weights before any training: model.from_pretrained, or --ckpt-path."""
    model = (running_config() or {}).get("model") or {}
    return model.get("from_pretrained") or (model.get("base") or {}).get("from_pretrained")


def base_weights() -> str | None:
    """As `loaded_weights`; where those are adapters, what they add to."""
    loaded, model = loaded_weights(), (running_config() or {}).get("model") or {}
    found = None if loaded is None or "base" not in model else find_state(loaded)
    return loaded if found is None or found[0].adapters is None else model["base"].get("from_pretrained")


def host_seed() -> int | None:
    """The seed in the running script's config; None where there is no script, or none in its config. Open-Sora seeds itself
    with 1024 then, see torch.initial_seed."""
    return (running_config() or {}).get("seed")


def trained_students(weights: str | Path) -> bool:
    """Did a PeRFlow run write these weights? Open-Sora's train.py dumps its config as config.txt into the folder above."""
    path = Path(weights)
    for folder in (path, *path.parents[:3]):
        try:
            config = json.loads((folder / "config.txt").read_text())
        except (OSError, ValueError, RecursionError):
            continue
        return _type(config, "scheduler").startswith("perflow") or _type(config, "model") == "perflow_flux"
    return False


def _type(config: Any, section: str) -> str:
    settings = config.get(section) if isinstance(config, dict) else None
    return str(settings.get("type", "")) if isinstance(settings, dict) else ""
