"""What the adaptations share: looking at the machine without importing anything, acting when a module is imported."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger("opensora_perflow.portable")


def announce(name: str, message: str) -> None:
    """Log the one line of an adaptation: what it replaced and why."""
    logger.info("portable %s: %s", name, message)


def has_cuda() -> bool:
    """Whether torch can use a CUDA device; the adaptations leave a machine that has one alone."""
    return torch.cuda.is_available()


def is_installed(name: str) -> bool:
    """Whether top-level module `name` could be imported; does not import it."""
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def package_file(package: str, relative: str) -> Path | None:
    """Path of a file inside an importable top-level package, found without importing it; None where there is none."""
    if not is_installed(package):
        return None
    locations = getattr(sys.modules.get(package), "__path__", None)
    if locations is None:
        spec = find_spec(package)
        locations = spec.submodule_search_locations if spec else None
    for location in locations or ():
        path = Path(location) / relative
        if path.is_file():
            return path
    return None


def source_mentions(package: str, relative: str, text: str) -> bool:
    """Whether the source file `relative` of `package` contains `text`: asks what a host needs without importing it."""
    path = package_file(package, relative)
    return path is not None and text in path.read_text(encoding="utf-8")


def provide_modules(origin: str, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Put stand-in modules into sys.modules.

    Args:
        origin: Module that makes them, for their docstrings.
        modules: Dotted name -> names in the module; a package comes before what is inside it.
    """
    for name, names in modules.items():
        module = ModuleType(name, f"Stand-in by {origin}.")
        # Without a __spec__ importlib.util.find_spec raises ValueError, and diffusers calls it at import.
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(names)
        sys.modules[name] = module
        package, _, inner = name.rpartition(".")
        if package:
            setattr(sys.modules[package], inner, module)


@contextmanager
def _cuda_stays_here() -> Iterator[None]:
    """While it lasts, tensor.cuda() returns the tensor: for one call only, so that other uses still fail loudly."""
    cuda = torch.Tensor.cuda
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    try:
        yield
    finally:
        torch.Tensor.cuda = cuda


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, within which tensor.cuda() returns the tensor."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _cuda_stays_here():
            return function(*args, **kwargs)

    return call


def when_imported(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call `change(module)` right after module `name` is first imported, or now if it already is.

    Code that runs `from name import thing` later sees the changed thing, because `change` runs before the import
    statement returns.
    """
    if sys.modules.get(name) is not None:
        change(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watcher(name, change))


class _Watcher(MetaPathFinder):
    """Finds one module as the other finders would, and wraps its loader so that the change follows its execution."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.change = change
        self.is_asking = False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name or self.is_asking:
            return None
        self.is_asking = True  # find_spec below asks every finder, this one included
        try:
            spec = find_spec(fullname)
        finally:
            self.is_asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ChangingLoader(spec.loader, self)
        return spec


class _ChangingLoader(Loader):
    """The module's own loader plus one call after it; takes itself out again once the module is there."""

    def __init__(self, loader: Any, watcher: _Watcher) -> None:
        self.loader = loader
        self.watcher = watcher

    def __getattr__(self, name: str) -> Any:  # get_source and friends: tracebacks and inspect ask the loader
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.watcher in sys.meta_path:
            sys.meta_path.remove(self.watcher)
        self.watcher.change(module)


class ModuleView(ModuleType):
    """A module as one importer sees it: some names replaced, every other looked up in the real module at each use.

    Put in place of a global of one module (`low_level_optim.dist = ModuleView(torch.distributed, ...)`), it changes a function
    for that module alone. The rest of the process keeps the real one.
    """

    def __init__(self, real: ModuleType, **replaced: Any) -> None:
        super().__init__(real.__name__, real.__doc__)
        self.__dict__["_real"] = real
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)
