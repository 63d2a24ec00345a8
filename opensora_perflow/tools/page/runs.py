"""What a run left in its folder: a demo's results.json, a training's record.jsonl, perflow.json, the host's config, videos."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from opensora_perflow.checkpoints import read_metadata
from opensora_perflow.training.record import FILE_NAME as RECORD
from opensora_perflow.training.record import read_record
from opensora_perflow.training.state import FILE_NAME as STATE
from opensora_perflow.training.state import METADATA_KEY

RESULT = "results.json"
CURVE = "curve.json"
MOST_VIDEOS = 4
MOST_BYTES = 20 * 2**20
"""Of one video in a page."""


@dataclass(frozen=True)
class Run:
    """One run. Whatever was not written is empty.

    name: Shown as the run's title.
    result: A demo's results.json; of a training, the samplers that `opensora-perflow curve --out FOLDER` compared.
    record: Lines of record.jsonl, in their order.
    state: What perflow.json says of the newest checkpoint.
    config: The host's config, as the host wrote it.
    videos: Name -> content of each MP4 file in the run's folder or in its folder `samples`.
    left_out: Names of videos that were too many or too large.
    """

    name: str
    result: dict[str, Any] = field(default_factory=dict)
    record: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    videos: dict[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The record's lines of a kind."""
        return [line for line in self.record if line["kind"] == kind]

    @cached_property
    def begin(self) -> dict[str, Any]:
        """How the run began last; empty without a record."""
        return next(reversed(self.lines("begin")), {})

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """One line a training step, the newest where a step was taken twice (resumed, rolled back)."""
        newest = {line["step"]: line for line in self.lines("step") if isinstance(line.get("step"), int)}
        return [newest[step] for step in sorted(newest)]

    @cached_property
    def history(self) -> list[float]:
        """The loss of each step, from the record or from a demo's result."""
        losses = [line.get("loss") for line in self.steps] or self.result.get("loss", {}).get("history", [])
        return [float(loss) for loss in losses if loss is not None]

    @cached_property
    def samplers(self) -> list[dict[str, Any]]:
        """Rows of the samplers' table: `sampler`, `nfe`, and what was measured of each."""
        return [row for row in self.result.get("samplers", []) if {"sampler", "nfe"} <= row.keys()]

    @cached_property
    def windows(self) -> list[dict[str, Any]]:
        """Rows of a demo's windows: `t_start`, `t_end`, errors of `teacher` and `student`, and perhaps `motion`."""
        rows = self.result.get("windows", [])
        return rows if all({"t_start", "t_end", "teacher", "student"} <= row.keys() for row in rows) else []

    @cached_property
    def paths(self) -> dict[str, Any]:
        """A demo's `times`, and `teacher` and `student` in a plane, see compare.drawn_paths; empty unless all are there."""
        found = self.result.get("paths") or {}
        return found if {"times", "teacher", "student"} <= found.keys() else {}

    @cached_property
    def motion_shares(self) -> list[float]:
        """The student's motion in each window, in parts of the teacher's; empty unless all were measured."""
        motions = [row.get("motion") or {} for row in self.windows]
        return [one["student"] / one["teacher"] for one in motions] if all(one.get("teacher") for one in motions) else []

    @cached_property
    def edges(self) -> list[float]:
        """Window edges, from 1 to 0; empty where unknown."""
        rows = self.windows
        of_rows = [rows[0]["t_start"], *(row["t_end"] for row in rows)] if rows else []
        return of_rows or list(self.begin.get("windows") or self.state.get("windows") or [])

    def sampler(self, begins: str, nfe: int | None = None) -> dict[str, Any] | None:
        """The first row of the table whose name begins so, with so many evaluations."""
        return next((row for row in self.samplers if row["sampler"].startswith(begins) and nfe in (None, row["nfe"])), None)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that the run was told, dotted names -> values."""
        parts = {
            "demo": self.result.get("settings"),
            "perflow": self.begin.get("recipe") or {k: self.state[k] for k in ("guidance", "draws") if k in self.state},
            "config": self.config,
        }
        return {name: value for part, known in parts.items() if known for name, value in _flat(known, part)}

    @cached_property
    def origins(self) -> dict[str, Any]:
        """Versions, seeds and where the teacher came from."""
        state = {**(self.begin.get("state") or {}), **self.state}
        found = {
            "opensora_perflow": self.begin.get("version") or state.get("version"),
            **self.result.get("versions", {}),
            "seed of the run": self.result.get("settings", {}).get("seed", self.config.get("seed")),
            "seed of the draws": (state.get("draws") or {}).get("seed"),
            "network": self.result.get("network") or (self.config.get("model") or {}).get("type"),
            "teacher": state.get("teacher_source"),
            "teacher's fingerprint": state.get("teacher"),
            "training steps": self.steps[-1]["step"] + 1 if self.steps else state.get("steps"),
            "seconds": self.result.get("seconds", self.steps[-1].get("time") if self.steps else None),
        }
        return {name: value for name, value in found.items() if value is not None}


def read_run(path: Path, name: str | None = None) -> Run:
    """Read what is in a run's folder.

    Args:
        path: The output folder of a demo or of a training, or its record.jsonl.
        name: Title; None: the folder's name.

    Raises:
        ValueError: no run's folder, one in which nothing is written yet, or a file in it that is no JSON.
    """
    folder = path.parent if path.name == RECORD else path
    if not any((folder / name).is_file() for name in (RESULT, RECORD, CURVE)):
        raise ValueError(
            f"RUN must be the folder of a demo ({RESULT}), of a training ({RECORD}) or of a curve ({CURVE}), got "
            f"{str(path)!r}, which has none of these files"
        )
    videos, left_out = {}, []
    for place in sorted([*folder.glob("*.mp4"), *folder.glob("samples/**/*.mp4")]):
        shown = place.relative_to(folder).as_posix()
        if len(videos) == MOST_VIDEOS or place.stat().st_size > MOST_BYTES:
            left_out.append(shown)
        else:
            videos[shown] = place.read_bytes()
    result = _json(folder / RESULT) or _of_curve(_json(folder / CURVE))
    record = read_record(folder) if (folder / RECORD).is_file() else []
    if not result and not record:
        raise ValueError(f"{folder} has nothing to report yet: its {RECORD} has no line; try again when training has begun")
    return Run(
        name or folder.resolve().name,
        result,
        record,
        _state(folder),
        _json(folder / "config.txt"),
        videos,
        tuple(left_out),
    )


def _of_curve(curve: Mapping[str, Any]) -> dict[str, Any]:
    """What `opensora-perflow curve` measured, as rows of a demo's table. Grids are made for students alone."""
    who = "student" if curve.get("grids") else "teacher"
    rows = [
        {"sampler": f"{who}, {row['steps']} steps", "nfe": row["nfe"], "endpoint_error": row["error"],
         "energy_distance": row["energy_distance"]}
        for row in curve.get("rows", [])
    ]  # fmt: skip
    return {"samplers": rows, "network": curve.get("model")} if rows else {}


def _state(folder: Path) -> dict[str, Any]:
    """perflow.json of the newest checkpoint, or what a demo's student says of itself."""
    found = sorted(folder.glob(f"*/{STATE}"), key=lambda path: path.stat().st_mtime)
    if found:
        return _json(found[-1])
    student = folder / "student.safetensors"
    text = read_metadata(student).get(METADATA_KEY, "{}") if student.is_file() else "{}"
    return json.loads(text)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); restore it, or move it away") from error
    return found if isinstance(found, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value
