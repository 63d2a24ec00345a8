"""The file that carries a plan: window edges, and a sampling grid for each number of steps it was made for.

    {"format": "opensora_perflow.plan/1", "edges": [1.0, ..., 0.0], "grids": [[1.0, ..., 0.0], ...], "report": {...}}

All times are untransformed and descend from 1 (noise) to 0 (data). `report` says what was measured; nothing reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from opensora_perflow.atomic import replacing
from opensora_perflow.checks import file_name, is_list, parse_json, plain, read_bounded, shown
from opensora_perflow.method.windows import TimeWindows

FORMAT = "opensora_perflow.plan/1"


def write_plan(
    path: str | os.PathLike, edges: Sequence[float], grids: Sequence[Sequence[float]], report: Mapping[str, Any]
) -> None:
    """Write a plan, atomically. `report` must be what JSON can hold."""
    plan = {"format": FORMAT, "edges": list(edges), "grids": [list(grid) for grid in grids], "report": dict(report)}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(plan, indent=1) + "\n")


def read_plan(path: str | os.PathLike) -> tuple[tuple[Any, ...], tuple[tuple[Any, ...], ...]]:
    """(edges, grids) of a plan, as they stand in the file; TimeWindows checks the numbers.

    Args:
        path: Relative paths start at the working directory.

    Raises:
        ValueError: no such file, or not a plan.
    """
    name = os.fspath(path)
    try:
        plan = parse_json(read_bounded(path))
    except OSError as error:
        raise ValueError(
            f"windows names the plan {name!r}, which cannot be read from {os.getcwd()} ({error.strerror or error}); "
            "write one with `opensora-perflow plan`, or give its full path"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"windows names {name!r}, which is not JSON ({error}); write a plan with `opensora-perflow plan`"
        ) from error
    found = plan.get("format") if isinstance(plan, Mapping) else None
    if found != FORMAT:
        raise ValueError(
            f'{name!r} is no plan: expected "format": "{FORMAT}", got {shown(found)}; write one with `opensora-perflow plan`'
        )
    edges, grids = plan.get("edges"), plan.get("grids", [])
    if not isinstance(edges, list) or not isinstance(grids, list) or not all(isinstance(grid, list) for grid in grids):
        raise ValueError(f"{name!r} is no whole plan: it needs edges, a list of times, and grids, a list of such lists")
    return tuple(edges), tuple(tuple(grid) for grid in grids)


def windows_of(value: int | Sequence[float] | str | os.PathLike | TimeWindows) -> TimeWindows:
    """Windows as configs write them: a number of uniform windows, the list of edges, or a plan's file.

    Raises:
        ValueError: anything else, invalid edges, or a file that is not there or holds no plan.
    """
    value = plain(value)
    if isinstance(value, TimeWindows):
        return value
    if isinstance(value, int):
        return TimeWindows.uniform(value)
    if isinstance(value, os.PathLike) or (isinstance(value, str) and value.endswith(".json")):
        name = file_name("a number, a list of edges or the name of a plan's file")("windows", value)
        edges, grids = read_plan(name)
        try:
            return TimeWindows(edges, grids)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if is_list(value):
        return TimeWindows(value)
    raise ValueError(
        "windows must be a number of windows (4), a descending list of edges ([1, 0.6, 0.2, 0]) or a plan's file "
        f'("plan.json"), got {shown(value)}'
    )
