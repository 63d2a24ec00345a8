"""Writing files so that nobody ever sees half of one."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name to write to; it takes the place of `path` at the end, or disappears on an error.

    The folder is made if it is missing. The suffix is kept, because some writers choose their format by it.
    """
    path = Path(path)
    with aside(path) as folder:
        temporary = folder / f"unfinished{path.suffix}"
        yield temporary
        os.chmod(temporary, 0o644)  # safetensors makes files that their owner alone may read
        os.replace(temporary, path)


@contextmanager
def aside(place: Path) -> Iterator[Path]:
    """A hidden folder beside `place`, where no other process writes; it disappears at the end.

    What killed processes left of earlier ones for this place is removed. Of a process that lives, a lock tells: of the folder,
    since writers of files put new ones in their place.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    folder, in_use = begin_aside(place.parent, f".{place.name}.unfinished-")
    try:
        yield folder
    finally:
        if in_use is not None:
            os.close(in_use)
        shutil.rmtree(folder, ignore_errors=True)


def begin_aside(home: Path, prefix: str) -> tuple[Path, int | None]:
    """A new folder and what locks it for as long as this process lives."""
    for left in left_by_killed(home, prefix):
        shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
        in_use = _lock(folder, wait=True)
        if folder.is_dir():
            return folder, in_use
        if in_use is not None:  # another process took the folder for a killed one's before the lock was there
            os.close(in_use)


def left_by_killed(home: Path, prefix: str) -> Iterator[Path]:
    """Folders of runs that live no more; each stays locked until the next one is asked for."""
    for folder in home.glob(f"{glob.escape(prefix)}*"):
        lock = _lock(folder, wait=False)
        if lock is not None:
            try:
                yield folder
            finally:
                os.close(lock)


def _lock(folder: Path, wait: bool) -> int | None:
    """A handle that locks a folder for as long as this process lives; None if another has it, or there are no locks."""
    if fcntl is None:
        return None
    with suppress(OSError):  # gone meanwhile, or another user's
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            os.close(handle)
        else:
            return handle
    return None
