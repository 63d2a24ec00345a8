"""Where `perflow` and its objectives are registered (mmengine registries)."""

from collections.abc import Mapping
from copy import deepcopy
from importlib.util import find_spec
from typing import Any

from mmengine.registry import Registry


def _host_schedulers() -> Registry | None:
    """Open-Sora's own SCHEDULERS, or None where Open-Sora (1.x) is not installed or cannot be imported."""
    if find_spec("opensora") is None:
        return None
    try:
        from opensora.registry import SCHEDULERS as host_schedulers
    except ImportError:  # Open-Sora 2.0 has no SCHEDULERS; 1.0 and 1.1 import all of their models here
        return None
    return host_schedulers


_HOST = _host_schedulers()
SCHEDULERS = Registry("scheduler", scope="opensora_perflow") if _HOST is None else _HOST  # an empty Registry is falsy
"""The registry that holds `perflow`: the host's where there is one."""

OBJECTIVES = Registry("objective", scope="opensora_perflow", locations=["opensora_perflow.objectives"])
"""Training objectives: functions (student, pair, t, frame_weights) -> loss [B]; see `objectives`."""


def build_module(config: Mapping[str, Any], registry: Registry) -> Any:
    """Build `dict(type=..., **kwargs)` from a registry, leaving the config as it was (as Open-Sora's own helper does).

    Raises:
        ValueError: the config has no `type`.
        KeyError: the type is not registered (mmengine's message names the registry).
    """
    if "type" not in config:
        raise ValueError(f"a module's config needs a 'type' key, got the keys {sorted(config)}; add type=\"perflow\"")
    return registry.build(deepcopy(dict(config)))
