"""The Open-Sora script that is running: the variables of its main(), and what its config says.

Open-Sora gives a scheduler, or a model, neither its config nor its checkpoint. Every script of every tag keeps its config in a
variable `cfg` of its own main(), from which everything is called: that is where this looks.
"""

import ast
import functools
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mmengine import Config
from mmengine.registry import Registry

from opensora_perflow.training.state import find_state

KEYS = {False: ("scheduler", "vae", "text_encoder"), True: ("ae", "t5", "clip")}
"""Sections that only configs of 1.x have, and of 2.0."""


def use_checkout(open_sora: Path | None, version: str = "") -> None:
    """Have `opensora` imported from a checkout; None: the installed one.

    `version`: Of Open-Sora, that is wanted, in words for the error.

    Raises:
        ValueError: no checkout there.
    """
    if open_sora is None:
        return
    root = open_sora.resolve()
    if not (root / "opensora" / "registry.py").is_file():
        raise ValueError(f"--open-sora must be the root of an Open-Sora{version and ' ' + version} checkout, got {str(root)!r}")
    sys.path.insert(0, str(root))


def cannot_import(error: ImportError) -> ValueError:
    """What is told where importing `opensora` failed: there is none, or a package of Open-Sora's is missing."""
    is_missing = (error.name or "").partition(".")[0] == "opensora"
    remedy = (
        "name its checkout: --open-sora ROOT" if is_missing else "install what is missing; docs/hosts.md has its environments"
    )
    return ValueError(f"Open-Sora cannot be imported ({error}); {remedy}")


def refuse_no_config(config: Path) -> None:
    """Raises ValueError where a config is no file, or no Python. Runs nothing of the config, and needs no Open-Sora."""
    if not config.is_file():
        raise ValueError(f"CONFIG must be a config's file, got {str(config)!r}, where no file is (looked in {Path.cwd()})")
    try:
        ast.parse(config.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{str(config)!r} is no config, which is a Python file ({error}); mend it, or name another") from error


def read_host_config(config: Path, is_v2: bool) -> Config:
    """A config, with the config's own imports done.

    `is_v2`: Is Open-Sora 2.0 imported, not 1.x?

    Raises:
        ValueError: whatever the config raises, which is a program; a config of the other Open-Sora.
    """
    try:
        named = Config.fromfile(config, import_custom_modules=False)
        own, other = (any(named.get(key) for key in KEYS[second]) for second in (is_v2, not is_v2))
        if own or not other:
            return Config.fromfile(config)
    except Exception as error:
        raise ValueError(
            f"{str(config)!r} cannot be read ({type(error).__name__}: {error}); mend it, or name another"
        ) from error
    here, there = ("2.0", "1.x") if is_v2 else ("1.x", "2.0")
    raise ValueError(
        f"{str(config)!r} is a config of Open-Sora {there}, and the checkout is Open-Sora {here}; name a config or a checkout "
        "(--open-sora ROOT) that goes with the other"
    )


def main_variable(name: str) -> Any:
    """A variable of main() of the Open-Sora script that is calling; None where it has none, or when called from elsewhere."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "main":
            variables = frame.f_locals
            config, found = variables.get("cfg"), variables.get(name)
            # Up to Python 3.12 this is a copy that the frame keeps, and with it the first batch on the GPU for the whole run. A
            # debugger writes such a copy back, so that there it stays.
            if isinstance(variables, dict) and sys.gettrace() is None:
                variables.clear()
            if hasattr(config, "get") and (config.get("scheduler") or config.get("model")) is not None:
                return found
        frame = frame.f_back
    return None


def before_builds(registries: Iterable[Registry], check: Callable[[Mapping[str, Any]], None]) -> None:
    """Have `check(config)` called before any of the registries builds something for a running script."""
    for registry in registries:
        if not hasattr(registry.build_func, "checks_early"):
            registry.build_func = _checked(registry.build_func, check)


def _checked(build: Callable[..., Any], check: Callable[[Mapping[str, Any]], None]) -> Callable[..., Any]:
    @functools.wraps(build)
    def checked(*args: Any, **kwargs: Any) -> Any:
        config = main_variable("cfg")
        if config is not None:
            check(config)
        return build(*args, **kwargs)

    checked.checks_early = True
    return checked


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
    """Did a PeRFlow run write these weights?"""
    config = config_above(weights)
    return _type(config, "scheduler").startswith("perflow") or _type(config, "model") == "perflow_flux"


def config_above(weights: str | Path) -> Any:
    """The config that Open-Sora's train.py dumps as config.txt into the folder above weights; None where there is none."""
    path = Path(weights)
    for folder in (path, *path.parents[:3]):
        try:
            return json.loads((folder / "config.txt").read_text())
        except (OSError, ValueError, RecursionError):
            continue
    return None


def ema_decay_of(checkpoint: str | Path) -> float | None:
    """The decay of the average in a checkpoint folder, as its training's config.txt says; None where nothing tells.

    1.0 and 1.1 know no such key, and always have the others' default.
    """
    config = config_above(checkpoint)
    decay = config.get("ema_decay", 0.9999) if isinstance(config, dict) else None
    return float(decay) if isinstance(decay, (int, float)) and 0 <= decay <= 1 else None


def _type(config: Any, section: str) -> str:
    settings = config.get(section) if isinstance(config, dict) else None
    return str(settings.get("type", "")) if isinstance(settings, dict) else ""
