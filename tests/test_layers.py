"""Folders are layers: what each may import, and that dependencies run downwards only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "opensora_perflow"

PLUMBING = {"conventions", "registry", "files", "checkpoints", "removed"}
LAYERS = {
    "method": (PLUMBING, {"windows", "schedule", "overlap", "solvers", "predictions", "paths", "sampling", "guidance",
                          "long_video", "metrics", "motion"}),
    "objectives": (PLUMBING | {"method"}, {"objectives"}),
    "planning": (PLUMBING | {"method"}, {"planning"}),
    "training": (PLUMBING | {"method", "objectives"}, {"config", "curriculum", "drawing", "held_out", "teacher", "state",
                                                       "randomness", "plan_file"}),
    "hosts": (PLUMBING | {"method", "objectives", "training", "worlds", "portable"}, {"hosts", "scheduler"}),
    "worlds": (PLUMBING, {"demo"}),
    "portable": (set(), {"portable"}),
    "tools": (PLUMBING | {"method", "objectives", "planning", "training", "hosts", "worlds", "portable"},
              {"cli", "run", "plan_command", "plan_subjects", "__main__", "__init__"}),
}  # fmt: skip
"""Layer -> (what it may import besides itself, the modules and folders that make it up)."""

EXCEPTIONS = {
    ("demo.probes", "hosts"),
    ("demo.probes", "planning"),
    ("demo.run", "hosts"),
    ("demo.run", "method"),
    ("demo.run", "portable"),
    ("demo.run", "training"),
    ("demo.train_teacher", "objectives"),
    ("planning.fine_path", "objectives"),
    ("windows", "training"),
}
"""(module, layer that it may not import and does). The list may only shrink."""


def layer_of(module: str) -> str | None:
    """The layer of a module of the package; None for plumbing, which everything may import."""
    first = module.split(".")[0]
    return next((layer for layer, (_, parts) in LAYERS.items() if first in parts), None)


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
        layer = layer_of(module)
        allowed = PLUMBING if layer is None else LAYERS[layer][0] | {layer}
        for imported in imports(path):
            other = layer_of(imported)
            if other is not None and other not in allowed:
                found.add((module, other))
    return found


def test_every_module_has_a_layer():
    modules = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.suffix in (".py", "")}
    assert {module for module in modules - {"__pycache__"} if layer_of(module) is None} == PLUMBING


def test_dependencies_run_downwards_only():
    assert violations() - EXCEPTIONS == set()


@pytest.mark.parametrize("exception", sorted(EXCEPTIONS), ids=str)
def test_no_exception_outlives_its_reason(exception):
    assert exception in violations()
