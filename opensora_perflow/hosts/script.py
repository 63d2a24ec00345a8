"""The Open-Sora script that is running: the variables of its main().

Open-Sora gives a scheduler, or a model, neither its config nor its checkpoint. Every script of every tag keeps its config in a
variable `cfg` of its own main(), from which everything is called: that is where this looks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mmengine.registry import Registry


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
