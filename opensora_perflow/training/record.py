"""record.jsonl: what a run measured, one line a measurement. docs/record.md has the keys.

A line is appended by one write, so that a killed run leaves whole lines, but perhaps for the last. Readers leave out what is no
whole line. A resumed run in the same folder appends.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE_NAME = "record.jsonl"
FORMAT = 1


class Record:
    """Appends to FOLDER/record.jsonl.

    Args:
        folder: Of the run; None: nothing is written.

    Raises:
        OSError: the file cannot be opened or written.
    """

    def __init__(self, folder: str | os.PathLike | None) -> None:
        self.path = None if folder is None else Path(folder) / FILE_NAME
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._end_last_line()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a line of a kind; NaN and infinity become null, other floats keep 6 digits."""
        if self.path is None:
            return
        line = json.dumps(_plain({"kind": kind, "step": step, **values}), allow_nan=False)
        self._append(f"{line}\n".encode())

    def _append(self, content: bytes) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, content)
        finally:
            os.close(handle)

    def _end_last_line(self) -> None:
        """A run that was killed may have left half of one."""
        if self.path.is_file() and self.path.stat().st_size:
            with self.path.open("rb") as opened:
                opened.seek(-1, os.SEEK_END)
                whole = opened.read() == b"\n"
            if not whole:
                self._append(b"\n")


def read_record(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The whole lines of FOLDER/record.jsonl, in order.

    Args:
        folder: Of a run, or the file itself.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    path = Path(folder)
    path = path / FILE_NAME if path.is_dir() else path
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "kind" in found:
            lines.append(found)
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
