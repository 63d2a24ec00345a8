"""All files of a run appear together or not at all: they are written aside, and one rename puts them in place.

A rename of a folder is the only step that changes several files at once. A new folder is renamed to its place. A folder
that is there changes places with the new one. By then the new one holds the user's own files, as hard links, so nothing
is copied and nothing is ever missing. Linux and macOS have this exchange. Elsewhere, and for the current folder and mount
points, files are replaced one by one. The last one goes first and comes last, so that it stands for a whole run.
"""

import ctypes
import glob
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from opensora_perflow.atomic import aside, begin_aside, left_by_killed

logger = logging.getLogger("opensora_perflow")


@dataclass(frozen=True)
class Kind:
    """What belongs to a run in its folder; everything else is the user's.

    names: Files of a run; the last one stands for a whole run.
    marks: Names that are all there in the folder of an earlier run.
    folder: Subfolder that runs may write.
    is_own: Whether a file of that subfolder is a run's, by its name.
    """

    names: tuple[str, ...]
    marks: tuple[str, ...]
    folder: str
    is_own: Callable[[str], bool]

    def belongs(self, place: Path) -> bool:
        """Whether a path from the folder on is a run's."""
        in_folder = len(place.parts) == 2 and place.parts[0] == self.folder and self.is_own(place.name)
        return str(place) in self.names or in_folder

    def wrote(self, folder: Path) -> bool:
        """Whether a folder holds an earlier run."""
        return all((folder / name).is_file() for name in self.marks)

    def refuse_foreign(self, folder: Path) -> None:
        """Raises ValueError where a run would replace files that no run wrote, or the folder is a file."""
        if os.path.lexists(folder) and not folder.is_dir():
            raise ValueError(f"{folder} is no folder; choose another --out")
        below = folder / self.folder
        if below.is_symlink() or (below.exists() and not below.is_dir()):
            raise ValueError(f"{below} is a file or a link, where a run writes a folder; move it away, or choose another --out")
        foreign = [name for name in self.names if os.path.lexists(folder / name)]
        if foreign and not self.wrote(folder):
            raise ValueError(
                f"{folder} holds {', '.join(foreign)}, but no whole earlier run ({' and '.join(self.marks)}); move these files "
                "away, or choose another --out"
            )


@contextmanager
def together(out: Path, kind: Kind) -> Iterator[Path]:
    """A folder to write to, whose files take their places in `out` at the end, or disappear on an error.

    Raises:
        ValueError: `out` is a file, or holds files of a run's names that no run wrote.
    """
    out = Path(os.path.realpath(out))
    # A mount point, or a folder in one that may not be written to, has no place beside it.
    beside = not out.is_dir() or (os.access(out.parent, os.W_OK) and not os.path.ismount(out))
    home = out.parent if beside else out
    prefix, finished = f".{out.name}.unfinished-", f".{out.name}.finished-"
    # A run that was killed while it replaced files one by one left some of them.
    killed = any(home.glob(f"{glob.escape(finished)}*"))
    if not killed:
        kind.refuse_foreign(out)
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home):
        for left in left_by_killed(home, finished):
            _recover(left, out, kind)
        folder, in_use = begin_aside(home, prefix)
    removable = True
    try:
        yield folder
        with _locked(home):
            if not killed:
                kind.refuse_foreign(out)
            removable = False
            # From here on the folder may hold the user's files, and no half of one.
            folder = folder.rename(home / folder.name.replace(prefix, finished, 1))
            _put_in_place(folder, out, kind)
            removable = True
    finally:
        if in_use is not None:
            os.close(in_use)
        if removable:  # else the next run looks what is in it
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` at the end, or disappears on an error; `out` is not there yet.

    What killed processes left of earlier ones is removed.
    """
    with aside(out) as folder:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp's is its owner's alone
        os.rename(folder, out)


def unfinished(out: Path) -> list[Path]:
    """Folders in which runs write now what will be in `out`, or did until they were killed."""
    out = Path(os.path.realpath(out))
    return [folder for home in (out.parent, out) for folder in home.glob(f"{glob.escape(f'.{out.name}.unfinished-')}*")]


def _put_in_place(new: Path, out: Path, kind: Kind) -> None:
    if not out.is_dir():
        os.chmod(new, 0o777 & ~_umask())
        os.rename(new, out)
        return
    renewed = {path.name for path in new.iterdir()}
    if new.parent != out and not _is_current(out):
        try:
            _carry(out, new, lambda path: kind.belongs(path) and path.parts[0] in renewed | set(kind.names))
            shutil.copystat(out, new)
            _exchange(new, out)
        except OSError as error:
            logger.debug("%s cannot be exchanged at once: %s", out, error)
        else:
            # What was put into the old folder in the meantime.
            _carry(new, out, kind.belongs)
            return
    _replace_one_by_one(new, out, kind, renewed)


def _is_current(folder: Path) -> bool:
    """Whether this process, and so likely the user's shell, is in the folder: it would stay in the old one."""
    try:
        return Path.cwd().is_relative_to(folder)
    except FileNotFoundError:
        return False


def _carry(source: Path, target: Path, left_out: Callable[[Path], bool], place: Path = Path()) -> None:
    """Link files of one folder into another, unless something has their name there.

    Raises:
        OSError: a file system without hard links, or files that may not be linked.
    """
    for name in os.listdir(source / place):
        path = place / name
        old, new = source / path, target / path
        if left_out(path):
            continue
        if old.is_dir() and not old.is_symlink():
            if not new.exists() and not any(left_out(path / one) for one in os.listdir(old)):
                new.mkdir(parents=True)
                shutil.copystat(old, new)
            _carry(source, target, left_out, path)
        elif not os.path.lexists(new):
            new.parent.mkdir(parents=True, exist_ok=True)
            if old.is_symlink():
                os.symlink(os.readlink(old), new)
            else:
                os.link(old, new)


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change their names in one step.

    Raises:
        OSError: the system or the file system cannot.
    """
    library = ctypes.CDLL(None, use_errno=True) if sys.platform in ("linux", "darwin") else None
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        status = library.renameat2(here, names[0], here, names[1], exchange)
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        status = library.renamex_np(*names, 2)  # RENAME_SWAP
    else:
        raise OSError("no exchange of folders on this system")
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


def _replace_one_by_one(new: Path, out: Path, kind: Kind, renewed: set[str]) -> None:
    """The way without an exchange: no run stands in the folder in between, since its last file is taken away first."""
    *names, last = kind.names
    with suppress(FileNotFoundError):
        os.unlink(out / last)
    if kind.folder in renewed:
        target = out / kind.folder
        target.mkdir(exist_ok=True)
        for name in filter(kind.is_own, os.listdir(target)):
            if not (new / kind.folder / name).exists():
                os.unlink(target / name)
        for name in filter(kind.is_own, os.listdir(new / kind.folder)):
            os.replace(new / kind.folder / name, target / name)
    for name in (*names, last):
        if (new / name).exists():
            os.replace(new / name, out / name)


def _recover(left: Path, out: Path, kind: Kind) -> None:
    """Take a folder away that a run left when it was killed right after an exchange: it may hold a user's file."""
    try:
        if out.is_dir() and left.parent != out:
            _carry(left, out, kind.belongs)
        shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        logger.warning("left %s as it is: %s", left, error)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; without locks on this system or file system, none waits."""
    handle = None
    if fcntl is not None:
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
