"""Which captions a table or a folder's tables have for which videos."""

from __future__ import annotations

import logging
import ntpath
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from opensora_perflow.worlds.tables import Row, read_table

logger = logging.getLogger(__name__)


class Caption(NamedTuple):
    """A video and what a table says about it; empty text where it says nothing."""

    path: Path
    text: str


def captions_of_table(table: str | Path) -> list[Caption]:
    """The videos that a table names, row by row; relative paths are relative to the table.

    Raises:
        ValueError: as `read_table`, no column path, no row, or rows without a path.
    """
    table = Path(table)
    rows = _rows_with_paths(table)
    if not rows:
        raise ValueError(
            f"{table} names no videos; a CSV with a header line, the column path, and text for captions is "
            "accepted: write_clips makes one"
        )
    tree = _Tree()
    root = _common_folder(row.cells["path"] for row in rows)
    return [Caption(_locate(tree, table, row.cells["path"], root), row.cells.get("text", "").strip()) for row in rows]


def captions_of_folder(paths: list[Path], tables: Iterable[Path]) -> list[Caption]:
    """Each video of a folder with the captions that tables have for it: one entry for every different caption.

    A row means the video that its path leads to. Where no file is there, the folder was moved. The row then means the only
    video whose path ends like the row's own, from the folder on that all rows share.

    Args:
        paths: The videos.
        tables: CSV files; those without the columns path and text are left out.

    Returns:
        In the order of `paths`; a video that no row means has one entry without text.

    Raises:
        ValueError: as `read_table`, of a table that does have these columns.
    """
    videos = _Videos(paths)
    texts: dict[int, list[str]] = {}
    moved: dict[int, list[_Claim]] = {}
    tree = _Tree()
    for table in filter(_is_caption_table, tables):
        rows = _rows_with_paths(table)
        root = _common_folder(row.cells["path"] for row in rows)
        for row in rows:
            written, text = row.cells["path"], row.cells.get("text", "").strip()
            index = videos.at(tree.find(table.parent, written))
            if index is not None:
                texts.setdefault(index, []).append(text)
            elif (match := videos.closest(_tail(written, root), _parts(written))) is not None:
                claim = _Claim(match[1], _fold("/".join(_parts(written))), text)
                moved.setdefault(match[0], []).append(claim)
    for index, claims in moved.items():
        if index not in texts:
            texts[index] = _texts_of_moved(paths[index], claims)
    return [
        Caption(path, text)
        for index, path in enumerate(paths)
        for text in list(dict.fromkeys(filter(None, texts.get(index, [])))) or [""]
    ]


class _Claim(NamedTuple):
    """A row that may mean a video: how many last parts of their paths agree, the row's path, its caption."""

    shared: int
    written: str
    text: str


def _texts_of_moved(path: Path, claims: list[_Claim]) -> list[str]:
    """Captions of the rows nearest to a video; they must all name it alike, for "a/x.mp4" and "b/x.mp4" are two videos."""
    nearest = [claim for claim in claims if claim.shared == max(other.shared for other in claims)]
    if len({claim.written for claim in nearest}) > 1:
        logger.warning("no caption for %s: rows of different videos could mean it; write its path into the table", path)
        return []
    return [claim.text for claim in nearest]


class _Videos:
    """The videos of a folder, found by path, by the file that a link leads to, or by the end of a path."""

    def __init__(self, paths: list[Path]) -> None:
        self._named: dict[str, list[tuple[int, list[str]]]] = {}  # last part of the path -> (index, all its parts)
        for index, path in enumerate(paths):
            parts = [_fold(part) for part in Path(os.path.abspath(path)).parts]
            self._named.setdefault(parts[-1], []).append((index, parts))
        self._lookups: list[tuple[Callable[[Path], str], dict[str, list[int]]]] = []
        # Links last: two links to one file are two videos.
        for name_of in (os.path.abspath, lambda path: _fold(os.path.abspath(path)), os.path.realpath):
            places: dict[str, list[int]] = {}
            for index, path in enumerate(paths):
                places.setdefault(name_of(path), []).append(index)
            self._lookups.append((name_of, places))

    def at(self, path: Path | None) -> int | None:
        """Index of the one video at a path."""
        if path is not None:
            for name_of, places in self._lookups:
                if len(found := places.get(name_of(path), [])) == 1:
                    return found[0]
        return None

    def closest(self, tail: tuple[str, ...], written: tuple[str, ...]) -> tuple[int, int] | None:
        """(index, last parts in common) of the one video that ends in `tail` and shares most parts with `written`."""
        folded = [_fold(part) for part in written]
        candidates = self._named.get(folded[-1], []) if folded else []
        shared = [(index, len(list(_while_equal(zip(reversed(folded), reversed(parts)))))) for index, parts in candidates]
        most = max((count for _, count in shared), default=0)
        found = [match for match in shared if match[1] == most]
        return found[0] if len(found) == 1 and most >= len(tail) else None


def _is_caption_table(table: Path) -> bool:
    """Whether the first line names the columns path and text, in any encoding: other tables may lie beside videos."""
    with open(table, "rb") as file:
        header = file.readline(65536).replace(b"\0", b"")
    names = {name.strip(b" \t\r\n\"'") for name in re.sub(rb"[\x80-\xff]", b"", header).split(b",")}
    return {b"path", b"text"} <= names


def _rows_with_paths(table: Path) -> list[Row]:
    """Rows that hold anything; all of them must name a path."""
    rows = [row for row in read_table(table) if any(cell.strip() for cell in row.cells.values())]
    if rows and "path" not in rows[0].cells:
        raise ValueError(
            f"{table} names no videos: its columns are {', '.join(map(repr, rows[0].cells))}; the column path, and text for "
            "captions, are accepted, separated by commas: write_clips makes such a table"
        )
    empty = [str(row.line) for row in rows if not row.cells["path"].strip()]
    if empty:
        raise ValueError(
            f"{table}: no path in line {', '.join(empty[:5])} ({len(empty)} such rows); name a video, or take them out"
        )
    return rows


def _locate(tree: _Tree, table: Path, written: str, root: tuple[str, ...]) -> Path:
    """The file that a path in a table means, or the path as written where there is none."""
    found = tree.find(table.parent, written)
    if found is None and _is_absolute(written):
        found = tree.find(table.parent, "/".join(_tail(written, root)))
        if found is not None:
            logger.info("%s: %s is not there, took %s", table, written, found)
    return found or Path(os.path.abspath(table.parent / written))


class _Tree:
    """Files found by paths of other systems: macOS decomposes accents, Windows has backslashes and ignores case."""

    def __init__(self) -> None:
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def find(self, folder: Path, written: str) -> Path | None:
        """The file at `written` from `folder` on; None where there is none, or two names differ in case alone."""
        for spelling in dict.fromkeys((written, written.strip(), written.strip().replace("\\", "/"))):
            path = Path(os.path.abspath(folder / spelling))
            if spelling and os.path.isfile(path):
                return path
        parts = _parts(written)
        if not parts or ntpath.splitdrive(written.strip())[0]:
            return None
        path = Path("/") if _is_absolute(written) else Path(os.path.abspath(folder))
        for part in parts:
            names = self._names(path).get(_fold(part), [])
            exact = [name for name in names if _compose(name) == _compose(part)]
            if part == "..":
                path = path.parent
            elif len(exact or names) == 1:
                path = path / (exact or names)[0]
            else:
                return None
        return path

    def _names(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._listings:
            listing: dict[str, list[str]] = {}
            try:
                for name in os.listdir(folder):
                    listing.setdefault(_fold(name), []).append(name)
            except OSError:
                pass
            self._listings[folder] = listing
        return self._listings[folder]


def _common_folder(paths: Iterable[str]) -> tuple[str, ...]:
    """Leading parts that the folders of all absolute paths share."""
    folders = [_parts(path)[:-1] for path in paths if _is_absolute(path)]
    return tuple(part[0] for part in _while_equal(zip(*folders))) if folders else ()


def _while_equal(columns: Iterable[tuple[str, ...]]) -> Iterable[tuple[str, ...]]:
    for column in columns:
        if len(set(column)) > 1:
            return
        yield column


def _tail(written: str, root: tuple[str, ...]) -> tuple[str, ...]:
    """A row's path from the folder that all rows share."""
    parts = tuple(part for part in _parts(written) if part != "..")
    return parts[len(root) :] if _is_absolute(written) else parts


def _parts(written: str) -> tuple[str, ...]:
    """Parts of a path of any system, without root and dots."""
    return tuple(part for part in re.split(r"[/\\]+", written.strip()) if part not in ("", "."))


def _is_absolute(written: str) -> bool:
    return written.strip().startswith(("/", "\\")) or bool(ntpath.splitdrive(written.strip())[0])


def _compose(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _fold(name: str) -> str:
    return _compose(_compose(name).casefold())
