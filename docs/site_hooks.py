"""MkDocs hooks: pages from outside docs/, the reference of keys from the code's docstrings, and links as GitHub reads them.

A page is written for GitHub, and the site shows the same file. So this module adds what MkDocs does not know: pages at
other places of the repository, links to them, and lists that follow a line of text.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "README_zh.md": "index_zh.md",
    "benchmarks/README.md": "benchmarks.md",
    "patches/README.md": "patches.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
"""Files outside docs/ -> their pages in the site, which is flat."""
KEYS = ("training/recipe.py", "training/matching.py", "training/curriculum.py", "hosts/v1/keys.py", "hosts/v2/keys.py")
"""Modules that hold keys."""

unwritten: set[str] = set()
"""Pages that the menu names and nobody has written yet."""


def on_config(config: Any) -> Any:
    """Leave pages that are not written out of the menu; text that leads to them is then no link."""
    written = {*PAGES.values(), "reference.md", *(path.name for path in (REPOSITORY / "docs").glob("*.md"))}
    for group in config["nav"]:
        for name, pages in group.items():
            unwritten.update(*(set(page.values()) - written for page in pages))
            group[name] = [page for page in pages if set(page.values()) <= written]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside docs/, and the reference."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(REPOSITORY / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links and lists as GitHub reads them."""
    source = {name: path for path, name in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return _spaced_lists(_site_links(markdown, source))


def _site_links(markdown: str, source: str) -> str:
    """Links of a file of the repository, as links of its page; a link to no page is refused by `mkdocs build --strict`."""

    def link(match: re.Match) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.removeprefix("docs/") in unwritten:
            return text
        return f"[{text}]({PAGES.get(path, path.removeprefix('docs/'))}{anchor})"

    return re.sub(r"\[([^\[\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)", link, markdown)


def _spaced_lists(markdown: str) -> str:
    """A blank line before each list that follows a line of text, outside code."""
    lines, in_code = [], False
    for line in markdown.split("\n"):
        in_code ^= line.lstrip().startswith("```")
        before = lines[-1] if lines else ""
        starts = re.match(r"(-|\d+\.) ", line) and before.strip() and not re.match(r"(-|\d+\.|\s) ?", before)
        lines += ["", line] if starts and not in_code else [line]
    return "\n".join(lines)


def reference() -> str:
    """Every key with its default and the docstring that the code gives it, as Markdown."""
    parts = [
        "# Keys, from the code",
        "Made from docstrings. [Every key](config.md) says more, with the measurement behind each.",
    ]
    for module in KEYS:
        tree = ast.parse((REPOSITORY / "opensora_perflow" / module).read_text(encoding="utf-8"))
        for node in filter(lambda node: isinstance(node, ast.ClassDef), tree.body):
            keys = list(_keys(node))
            if keys:
                parts.append(f"## {node.name}, {module}\n\n{ast.get_docstring(node) or ''}")
                parts += [f"`{name}`, default `{default}`: {text}" for name, default, text in keys]
    return "\n\n".join(parts) + "\n"


def _keys(node: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """(name, default, docstring) of each field of a dataclass that is made by `checks.key` or a path's own maker."""
    for field, after in zip(node.body, [*node.body[1:], None]):
        value = getattr(field, "value", None)
        if isinstance(field, ast.AnnAssign) and isinstance(value, ast.Call) and value.func.id in ("key", "_rflow", "_iddpm"):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            yield field.target.id, ast.unparse(value.args[0]), " ".join(str(text).split())
