"""Folders are layers: what each may import, and that dependencies run downwards only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "opensora_perflow"

PLUMBING = {"conventions", "registry", "atomic", "checkpoints", "checks"}
LAYERS = {
    "method": PLUMBING,
    "objectives": PLUMBING | {"method"},
    "planning": PLUMBING | {"method"},
    "training": PLUMBING | {"method", "objectives"},
    "worlds": PLUMBING,
    "portable": set(),
    "hosts": PLUMBING | {"method", "objectives", "training", "worlds", "portable"},
    "run": {"portable"},
    "tools": PLUMBING | {"method", "objectives", "planning", "training", "hosts", "worlds", "portable", "run"},
}
"""Folder (or module) -> what it may import besides itself. Plumbing imports plumbing; the package's own __init__ and __main__
import what they show."""

EXCEPTIONS = {
    ("method.draws", "training"),
    ("objectives.combination", "training"),
    ("method.windows", "training"),
    ("planning.fine_path", "objectives"),
}
"""(module, layer that it may not import and does). The list may only shrink."""


def layer_of(module: str) -> str | None:
    """The layer of a module of the package; None for plumbing, which everything may import."""
    first = module.split(".")[0]
    return first if first in LAYERS else None


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module] if node.module != "opensora_perflow" else [f"{node.module}.{a.name}" for a in node.names]
        found |= {name.removeprefix("opensora_perflow.") for name in names if name.startswith("opensora_perflow.")}
    return found


def violations() -> set[tuple[str, str]]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module in ("__init__", "__main__"):
            continue
        layer = layer_of(module)
        allowed = PLUMBING if layer is None else LAYERS[layer] | {layer}
        others = {layer_of(imported) for imported in imports(path)} - {None}
        found |= {(module, other) for other in others - allowed}
    return found


def test_every_module_has_a_layer():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix in (".py", "")} - {"__pycache__", "__init__", "__main__"}
    assert modules - set(LAYERS) <= PLUMBING


def test_dependencies_run_downwards_only():
    assert violations() - EXCEPTIONS == set()


@pytest.mark.parametrize("exception", sorted(EXCEPTIONS), ids=str)
def test_no_exception_outlives_its_reason(exception):
    assert exception in violations()
