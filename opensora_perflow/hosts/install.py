"""Put the plugin into an Open-Sora checkout, say what of it is there, and take it out again.

Two things go in: the patch of the tag, and this package's configs, as links or copies beside the host's own. The patch is one
line that registers `perflow`, see patches/; Open-Sora 2.0 needs none. A record in the tree says what was put in: a later
version of this package takes out what an earlier one put in. Nothing that the record does not name is ever removed, and
nothing is overwritten.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import opensora_perflow
from opensora_perflow.hosts.install_record import (
    PATCHED,
    RECORD,
    Record,
    Tree,
    part_of,
    read_record,
    refuse_links,
    write_record,
    write_whole,
)

TAGS = {
    "2.0": "scripts/diffusion/train.py",
    "v1.3": "scripts/inference_i2v.py",
    "v1.2.0": "opensora/models/stdit/stdit3.py",
    "v1.1.0": "opensora/models/stdit/stdit2.py",
    "v1.0.0": "opensora/models/stdit/stdit.py",
}
"""Open-Sora's tags, newest first, each with a file that the older ones lack. Its setup.py says 1.2.0 in v1.3 too.

2.0 is upstream's main branch. There a model is what a config chooses, and its custom_imports register ours.
"""

_COMMON = ("opensora/registry.py", PATCHED, "scripts/train.py", "configs/opensora")
_COMMON_2 = ("opensora/registry.py", "configs/diffusion/train", "configs/diffusion/inference")


@dataclass(frozen=True)
class Status:
    """What of the plugin is in a tree."""

    tag: str
    registers: bool | None
    """Whether the line that registers `perflow` is there; None where none is needed."""
    conflict: str
    """Why the patch can neither be applied nor taken out, naming the file; empty if it can."""
    record: Record | None
    """None where nothing was installed."""
    missing: tuple[str, ...]
    """Configs that are to be there and are not, or are links to nothing; paths in the tree."""
    edited: tuple[str, ...]
    """Configs that were changed since they were put there; paths in the tree."""
    outdated: bool
    """Whether another version of this package, or the same at another place, put them there."""

    @property
    def complete(self) -> bool:
        """Whether everything is there, as this version of the package would put it. Edited copies are the user's right."""
        return self.record is not None and self.registers is not False and not self.missing and not self.outdated


def find_tag(root: Path) -> str:
    """Which of Open-Sora's tags a tree is, by the files that it has.

    Raises:
        ValueError: none of them.
    """
    tag = next((tag for tag, newest in TAGS.items() if (root / newest).is_file()), None)
    missing = [name for name in (_COMMON_2 if tag == "2.0" else _COMMON) if not (root / name).exists()]
    if missing or tag is None:
        raise ValueError(
            f"ROOT must be a checkout of hpcaitech/Open-Sora at {', '.join(reversed(TAGS))}, got {str(root)!r}, which has no "
            f"{(missing or [TAGS['v1.0.0']])[0]}; clone one of these tags, for example with --branch v1.3 (2.0 is "
            "the main branch)"
        )
    return tag


def check(root: str | os.PathLike) -> Status:
    """What of the plugin is in the tree at `root`. Changes nothing.

    Raises:
        ValueError: a tree that is none of Open-Sora's tags, a damaged record, folders that are links out of the tree, no git.
    """
    tree = _tree(root)
    record, patch = read_record(tree), _patch_for(tree.tag)
    registers, conflict = _patch_state(tree.root, record.patch if record else patch)
    wanted = _wanted(tree, copy=record is not None and record.copied)
    refuse_links(tree, {**wanted, **(record.configs if record else {})})
    if record is None:
        return Status(tree.tag, registers, conflict, None, tuple(map(tree.name, wanted)), (), False)
    missing = tuple(tree.name(name) for name in record.configs if not tree.path(name).exists())
    changed = (tree.name(name) for name, content in record.configs.items() if _content(tree.path(name)) != content)
    edited = tuple(name for name in changed if name not in missing)
    outdated = (record.patch, dict(record.configs)) != (patch, wanted)
    return Status(tree.tag, registers, conflict, record, missing, edited, outdated)


def install(root: str | os.PathLike, *, copy: bool = False) -> bool:
    """Apply the tag's patch to the tree at `root` and put the configs into it; after a failure nothing of them is left.

    Args:
        root: Folder of an Open-Sora checkout; need not be a git repository.
        copy: Copy the configs, to be edited or to be used where this package is not; else link them. A tree that has them the
            other way, or from another version of this package, is changed over.

    Returns:
        Whether anything had to be done.

    Raises:
        ValueError: see `check`; edits where the patch goes; files in the way of configs; edited configs that would be replaced.
            The message names the files.
    """
    tree, status = _tree(root), check(root)
    if status.complete and status.record.copied == copy:
        return False
    if status.conflict:
        raise ValueError(status.conflict)
    record = Record(opensora_perflow.__version__, _patch_for(status.tag), copy, _wanted(tree, copy))
    ours = status.record.configs if status.record else {}
    taken = [tree.name(name) for name in record.configs if name not in ours and os.path.lexists(tree.path(name))]
    if status.edited:
        raise ValueError(f"nothing was installed, because {_names(status.edited)} was edited; move it away, then install again")
    if taken:
        raise ValueError(
            f"nothing was installed, because {_names(taken)} would be overwritten; move it away, then install again"
        )
    if status.record:
        uninstall(root)
    try:
        write_record(tree, record)
        for name in record.configs:
            _put(_source(tree) / name, tree.path(name), copy)
        if _patch_state(tree.root, record.patch)[0] is False:  # a line that was there before, put in by hand, is taken as ours
            _git_apply(tree.root, record.patch)
    except BaseException:
        _remove_configs(tree, record)
        raise
    return True


def uninstall(root: str | os.PathLike) -> bool:
    """Take everything that `install` put into the tree at `root` out again.

    Returns:
        Whether there was anything.

    Raises:
        ValueError: see `check`; edits around the registering line, or edited configs, which are not thrown away. Then nothing
            was removed.
    """
    tree, status = _tree(root), check(root)
    if status.conflict:
        raise ValueError(status.conflict)
    if status.edited:
        raise ValueError(f"nothing was removed, because {_names(status.edited)} was edited; move it away, then uninstall again")
    if status.registers:
        _git_apply(tree.root, status.record.patch if status.record else _patch_for(status.tag), "--reverse")
    if status.record:
        _remove_configs(tree, status.record)
    halves = _remove_parts(tree, _wanted(tree, copy=False))
    return bool(status.registers) or status.record is not None or halves


def imported_tree() -> Path | None:
    """Folder of the Open-Sora that this Python imports as `opensora`; None if it imports none."""
    spec = find_spec("opensora")
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve().parents[1]


def _shipped(name: str) -> Path:
    """The folder `patches` or `configs`: inside the package where it was built, beside it in a checkout of its source."""
    package = Path(opensora_perflow.__file__).resolve().parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise ValueError(f"this installation of opensora-perflow has no folder {name} in {package}; install the package again")


def _tree(root: str | os.PathLike) -> Tree:
    root = Path(root).resolve()
    return Tree(root, find_tag(root))


def _source(tree: Tree) -> Path:
    return _shipped("configs") / tree.source[0]


def _patch_for(tag: str) -> str:
    if tag == "2.0":
        return ""
    (path,) = _shipped("patches").glob(f"*-{tag}.patch")
    return path.read_text(encoding="utf-8")


def _wanted(tree: Tree, copy: bool) -> dict[str, str]:
    """Every config by its path below the tree's folder of them, and what `_content` is to say of it."""
    source = _source(tree)
    paths = sorted(path for pattern in tree.source[1] for path in source.glob(pattern))
    return {path.relative_to(source).as_posix(): _content(path) if copy else f"link {path}" for path in paths}


def _content(path: Path) -> str | None:
    """What stands at a path: "link TARGET" or "sha256 DIGEST"; None for nothing, or for what is no file."""
    if path.is_symlink():
        return f"link {os.readlink(path)}"
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else None


def _put(source: Path, path: Path, copy: bool) -> None:
    path.parent.mkdir(exist_ok=True)
    if copy:
        write_whole(path, source.read_bytes())
    else:
        path.symlink_to(source)


def _remove_parts(tree: Tree, names: Iterable[str]) -> bool:
    """Remove what a process left that was killed while it wrote configs or the record; was there anything?"""
    parts = [part_of(tree.path(name)) for name in (RECORD, *names)]
    found = [part for part in parts if os.path.lexists(part)]
    for part in found:
        part.unlink()
    return bool(found)


def _remove_configs(tree: Tree, record: Record) -> None:
    """Remove what the record names, where it is still what was put there; the record itself last."""
    for name, content in record.configs.items():
        path = tree.path(name)
        if _content(path) == content:
            path.unlink()
    _remove_parts(tree, record.configs)
    for folder in {tree.path(name).parent for name in record.configs} - {tree.root / tree.folder}:
        with suppress(OSError):  # it is not there, or holds files of the user's
            folder.rmdir()
    tree.path(RECORD).unlink(missing_ok=True)


def _patch_state(root: Path, patch: str) -> tuple[bool | None, str]:
    """Whether the patch is in the tree (None without one); and if it neither is nor could be, why."""
    if not patch:
        return None, ""
    try:
        _git_apply(root, patch, "--check", "--reverse")
        return True, ""
    except ValueError:
        pass
    try:
        _git_apply(root, patch, "--check")
        return False, ""
    except ValueError as error:
        return False, str(error)


def _git_apply(root: Path, patch: str, *options: str) -> None:
    """Run `git apply` on a tree, which does the whole patch or nothing.

    Git is kept away from every repository. The tree need not be one, and may lie inside another. Git would then take the
    patch's paths from the other one's top. Neither may the user's settings (apply.whitespace and such) change what is applied.

    Raises:
        ValueError: there is no git; or the patch does not fit, because of edits (the message names the files).
    """
    git = shutil.which("git")
    if git is None:
        raise ValueError("patches are applied by git, and there is no `git` on PATH; install it")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_DIR": os.devnull, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    command = [git, "apply", *options, "-"]
    result = subprocess.run(command, cwd=root, env=environment, input=patch.encode(), capture_output=True)
    if result.returncode != 0:
        files = re.findall(r"^\+\+\+ b/(.+)$", patch, re.M)
        reason = result.stderr.decode(errors="replace").strip().replace("\n", "; ")
        raise ValueError(
            f"{_names(files)} has edits where perflow is registered; take them out (git diff shows them), then try again. Git "
            f"says: {reason}"
        )


def _names(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
