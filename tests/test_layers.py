"""Folders are layers: what each may import, and that dependencies run downwards only."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "opensora_perflow"

LAYERS = {
    "conventions": set(),
    "atomic": set(),
    "checks": set(),
    "registry": set(),
    "checkpoints": {"atomic"},
    "method": {"conventions", "checks"},
    "objectives": {"conventions", "checks", "registry", "method"},
    "planning": {"conventions", "checks", "method"},
    "training": {"conventions", "checks", "atomic", "checkpoints", "method", "objectives"},
    "worlds": {"conventions", "atomic"},
    "portable": set(),
    "hosts": {"conventions", "checks", "atomic", "registry", "checkpoints", "method", "objectives", "training", "worlds",
              "portable"},
    "run": {"portable"},
    "tools": {"checks", "atomic", "registry", "checkpoints", "method", "objectives", "planning", "training", "hosts", "worlds",
              "portable", "run"},
}  # fmt: skip
"""Module or folder at the package's top -> what it may import besides itself. __init__ and __main__ import what they show."""


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
    """(module, layer that it may not import and does)."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        layer = module.split(".")[0]
        if layer not in ("__init__", "__main__"):
            others = {imported.split(".")[0] for imported in imports(path)} - {layer, "__version__"}
            found |= {(module, other) for other in others - LAYERS[layer]}
    return found


def test_every_module_has_a_layer():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix in (".py", "")} - {"__pycache__", "__init__", "__main__"}
    assert modules == set(LAYERS)


def test_dependencies_run_downwards_only():
    assert violations() == set()


def test_the_top_folder_is_small():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_every_name_that_is_imported_exists():
    """Also in modules that cannot be imported without a host."""
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    known = {}
    for path, tree in trees.items():
        nodes = list(ast.walk(tree))
        names = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        names |= {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        module = ".".join(("opensora_perflow", *path.relative_to(PACKAGE).with_suffix("").parts))
        known[module.removesuffix(".__init__")] = names
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in known:
                missing = {alias.name for alias in node.names} - known[node.module]
                assert not [name for name in missing if f"{node.module}.{name}" not in known], path
