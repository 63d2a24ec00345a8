"""CSV tables: read strictly, so that no row, accent or half of a caption is lost in silence."""

import codecs
import csv
import io
import threading
from pathlib import Path
from typing import NamedTuple

_MARKS = {  # UTF-32 before UTF-16: the one mark begins with the other
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FIELD_LIMIT = 2**27
_limit_lock = threading.Lock()


class Row(NamedTuple):
    """One row of a table: the line it ends on, from 1, and the column's name -> cell."""

    line: int
    cells: dict[str, str]


def read_table(table: str | Path) -> list[Row]:
    """The rows of a CSV file with a header; empty lines are left out.

    UTF-8, or UTF-16 and UTF-32 with a byte-order mark. Nothing is guessed: what is not certain is refused.

    Raises:
        ValueError: another encoding, an unclosed quote, a column named twice, or rows with more or fewer cells than the
            header. The message names the file and the lines.
        OSError: the file cannot be read.
    """
    table = Path(table)
    lines = _lines(table, _decode(table, table.read_bytes()))
    if not lines:
        return []
    names = [name.strip() for name in lines[0][1]]
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if twice:
        raise ValueError(f"{table} has two columns named {', '.join(map(repr, twice))}; name each column once")
    uneven = [(line, len(cells)) for line, cells in lines[1:] if len(cells) != len(names)]
    if uneven:
        shown = ", ".join(f"line {line} has {count}" for line, count in uneven[:5])
        raise ValueError(
            f"{table}: the header names {len(names)} columns ({', '.join(names)}), but {shown} ({len(uneven)} such rows); put "
            "captions that hold commas into quotes, and write an empty cell as two commas"
        )
    return [Row(line, dict(zip(names, cells))) for line, cells in lines[1:]]


def _lines(table: Path, text: str) -> list[tuple[int, list[str]]]:
    """(line, cells) of every row that is not empty."""
    try:
        with _limit_lock:
            before = csv.field_size_limit(_FIELD_LIMIT)
            try:
                reader = csv.reader(io.StringIO(text, newline=""), strict=True)
                return [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells) or len(cells) > 1]
            finally:
                csv.field_size_limit(before)
    except csv.Error as error:
        raise ValueError(
            f"{table}, line {reader.line_num}: {error}; put cells that hold commas, quotes or line breaks into quotes, and "
            'write "" for a quote inside'
        ) from error


def _decode(table: Path, raw: bytes) -> str:
    encoding = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in raw[:4096]:
        raise ValueError(f"{table} looks like UTF-16 without a byte-order mark, or is no text at all; save it as CSV UTF-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        found = raw[error.start : error.start + 1]
        guess = (
            f", which cp1252 (Windows, 'ANSI') reads as {found.decode('cp1252', 'replace')!r}" if encoding == "utf-8" else ""
        )
        raise ValueError(f"{table}, line {line}: not {encoding}: byte 0x{found.hex()}{guess}; save it as CSV UTF-8") from error
