"""Runs that the studio shows while they train, and the demo that it starts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from opensora_perflow.tools import outputs
from opensora_perflow.tools.page.runs import CURVE, RECORD, RESULT, Run, read_run

DEMO = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from opensora_perflow.tools.cli import main
sys.exit(main())
"""
"""The command, which Ctrl-C ends also where a shell has this process ignore Ctrl-C."""


def find_runs(places: Sequence[Path]) -> dict[str, Path]:
    """Folders of runs that have something to show, by the name that they are chosen by: a place itself, and those in it."""
    folders = [folder for place in places for folder in (place, *sorted(place.glob("[!.]*/"), reverse=True))]
    return {str(folder): folder for folder in folders if newest(folder) is not None}


def newest(folder: Path) -> Path | None:
    """Where a run writes now: its folder, or the hidden one of a demo that is not finished. None: there is nothing yet."""
    files = [place / name for place in (folder, *outputs.unfinished(folder)) for name in (RECORD, RESULT, CURVE)]
    written = [file for file in files if file.is_file()]
    return max(written, key=lambda file: file.stat().st_mtime).parent if written else None


def stamp(folder: Path) -> tuple[str, ...]:
    """Changes whenever there is something new to show."""
    place = newest(folder)
    files = [] if place is None else [file for file in (place / RECORD, place / RESULT) if file.is_file()]
    return tuple(f"{file} {file.stat().st_size} {file.stat().st_mtime}" for file in files)


def read(folder: Path) -> Run | None:
    """The run as it is now; None before its first line, or where it moved away while it was read."""
    place = newest(folder)
    try:
        return None if place is None else read_run(place, folder.name)
    except (OSError, ValueError):
        return None


class Training:
    """The demo, started as the command `opensora-perflow demo` in a process of its own.

    Args:
        out: Folder of the demo.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._process: subprocess.Popen | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log.txt"

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, quick: bool) -> None:
        """Begin a demo, unless one runs."""
        if self.runs:
            return
        command = [sys.executable, "-c", DEMO, "demo", "--out", str(self.out), *(["--quick"] if quick else [])]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self) -> None:
        """End it as Ctrl-C does: what was complete before stays."""
        if self.runs:
            self._process.terminate() if os.name == "nt" else self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def told(self) -> str:
        """Where it is, in a line."""
        if self._process is None:
            return ""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
        if not self.runs:
            # Before other lines: a bar may be drawn once more after the command's own last words.
            last = [*(lines or ["without a word"]), *re.findall("opensora-perflow: .*", text)][-1]
            return f"Finished: {self.out}/report.html" if self._process.returncode == 0 else f"Ended: {last}"
        stage = next((line for line in reversed(lines) if line.startswith("stage ")), "starting")
        bar = lines[-1] if lines and "%|" in lines[-1] else ""
        return f"{stage}. {bar}"
