"""Reads every config of one Open-Sora checkout with its scheduler's type replaced by perflow; see test_existing_configs.py.

    python _config_worker.py ROOT OUT.json

Nothing of a config is built but its scheduler, by the host's own build_module. Its network matters where only that tells
the path: the class is looked up, not built (the networks have a billion parameters).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def network_class(model_type: str) -> type:
    """The class that the factory of "STDiT3-XL/2" builds: STDiT3, a name in the factory's module."""
    from opensora.registry import MODELS

    factory = MODELS.get(model_type)
    return factory.__globals__[model_type.split("-")[0]]


def read(path: Path) -> dict[str, Any] | None:
    """What becomes of one config; None if it has no diffusion scheduler."""
    from mmengine import Config
    from opensora.registry import SCHEDULERS, build_module

    from opensora_perflow.hosts.v1.iddpm import guided_channels

    config = Config.fromfile(str(path))
    if config.get("scheduler") is None:
        return None
    original = config.scheduler.to_dict()
    config.scheduler.type = "perflow"
    found = {"model": config.model.type, "original": original}
    try:
        scheduler = build_module(config.scheduler, SCHEDULERS)
        network = SimpleNamespace(forward=network_class(config.model.type).forward, training=False)
        chosen, prediction = scheduler.process_of(network)
        json.dumps(config.to_dict())  # train.py writes it beside its checkpoints
    except ValueError as error:
        return {**found, "error": str(error)}
    kept = {key: getattr(scheduler.keys, key) for key in original if key != "type"}
    steps = scheduler.keys.steps_over(scheduler.windows)
    settings = {"sampling_steps": steps, "num_timesteps": scheduler.num_timesteps}
    settings["guided_channels"] = guided_channels(scheduler.keys.cfg_channel)
    return {**found, **settings, "path": type(chosen).__name__, "prediction": prediction, "kept": kept}


def main() -> None:
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(root))
    from opensora_perflow import portable
    from opensora_perflow.run import register_with_host

    portable.activate()
    register_with_host()
    results = {str(path.relative_to(root)): read(path) for path in sorted((root / "configs").rglob("*.py"))}
    out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
