"""The part of the doctor that needs no weights: a config, its data and its paths, in seconds.

A check is a function of a plan that gives findings; CHECKS lists them. Open-Sora itself is not imported, which takes longer
than all of them.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora_perflow.checks import shown
from opensora_perflow.hosts.encoded_captions import EncodedCaptions
from opensora_perflow.hosts.install import find_tag, imported_tree
from opensora_perflow.hosts.v1 import early as early_1
from opensora_perflow.hosts.v1.keys import read_config as read_config_1
from opensora_perflow.hosts.v2 import early as early_2
from opensora_perflow.hosts.v2.keys import read_config as read_config_2
from opensora_perflow.training.findings import Finding
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.state import find_state

SHORT = {"data_path": "dataset.data_path", "ckpt_path": "model.from_pretrained"}
"""Options of 1.x's train.py that mean a key of a section."""
SECTIONS = ("dataset", "model", "vae", "ae", "text_encoder", "t5", "clip")
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
NAMED = {"2k": 3_686_400, "4k": 8_294_400, "2880": 8_294_400}
"""Pixels of buckets whose names do not say them."""
APPROXIMATE = 0.8
"""Of a bucket's pixels, which a clip must have (opensora/datasets/bucket.py)."""
MOST_ROWS = 10_000
"""Of a CSV, that are looked at."""
CHECKPOINT = 8
"""Bytes of a checkpoint for each byte of 16-bit weights: network, EMA, two moments and masters of AdamW."""


@dataclass
class Plan:
    """What train.py is asked to do. root: Of the Open-Sora checkout, if there is one; tag: Which one."""

    config: Mapping[str, Any]
    root: Path | None = None
    tag: str | None = None
    recipe: Recipe | None = field(default=None)

    @property
    def is_second(self) -> bool:
        """Is it a config of Open-Sora 2.0?"""
        return "scheduler" not in self.config

    def section(self, name: str) -> Mapping[str, Any]:
        found = self.config.get(name)
        return found if isinstance(found, Mapping) else {}


Check = Callable[[Plan], Iterator[Finding]]


def keys(plan: Plan) -> Iterator[Finding]:
    """PeRFlow's keys, and what the hosts' own early checks say."""
    where = "model" if plan.is_second else "scheduler"
    kind, wanted = plan.section(where).get("type"), "perflow_flux" if plan.is_second else "perflow"
    if kind != wanted:
        yield Finding("keys", False, f"{where} type {shown(kind)}", shown(wanted), f"write {where}=dict(type={wanted!r}, ...)")
        return
    try:
        plan.recipe = _as_script(plan)
    except (ValueError, OSError) as error:
        yield Finding("keys", False, str(error), "known keys with values that go together", "follow the message")
        return
    yield Finding("keys", True, f"{where}=dict(type={wanted!r}) with {len(plan.section(where)) - 1} keys")
    edges = plan.recipe.windows.edges
    yield Finding("windows", True, f"{len(edges) - 1}: " + ", ".join(f"{edge:.4g}" for edge in edges))


def open_sora(plan: Plan) -> Iterator[Finding]:
    """Which Open-Sora it is, and that it has the types that the config names."""
    if plan.tag is None:
        yield Finding("Open-Sora", None, "no checkout is known; name one with --open-sora ROOT")
        return
    fits = plan.is_second == (plan.tag == "2.0")
    yield Finding(
        "Open-Sora", fits, f"{plan.tag} in {plan.root}", "2.0" if plan.is_second else "v1.0.0 to v1.3",
        "take a config for this Open-Sora: configs/opensora/v2/ for 2.0, configs/opensora/ for the others",
    )  # fmt: skip
    known = _registered(plan.root)
    named = {name: plan.section(name).get("type") for name in SECTIONS}
    unknown = [f"{n}=dict(type={t!r})" for n, t in named.items() if t and not t.startswith("perflow") and t not in known]
    yield Finding(
        "types", not unknown, ", ".join(unknown) or "all known", "types that this Open-Sora registers",
        "use a config for this version (perflow_*_v1_3.py are for v1.3, the others for v1.2), or name custom_imports",
    )  # fmt: skip


def data(plan: Plan) -> Iterator[Finding]:
    """The CSV, its files, and which of its clips fit a bucket."""
    kind = str(plan.section("dataset").get("type", ""))
    if kind == "perflow_stored":
        yield Finding("data", None, "the chains of a store")
        return
    captions = kind.startswith("perflow_captions")
    path = plan.section("dataset").get("data_path") or plan.config.get("data_path")  # 1.0 has no section
    if path is None:
        yield Finding(
            "data", None if captions else False, "no data_path", "a CSV",
            "add -- --data-path videos.csv (2.0: --dataset.data-path videos.csv)",
        )  # fmt: skip
        return
    try:
        rows = _rows(Path(path), header=plan.tag != "v1.0.0", column="text" if captions else "path")
    except (OSError, ValueError, csv.Error) as error:
        yield Finding(
            "data",
            False,
            f"{path}: {error}",
            "a CSV with text, and path where there are videos",
            "write one, see docs/recipes.md",
        )
        return
    if captions:  # texts alone
        yield Finding("data", bool(rows), f"{len(rows)} rows of captions", "rows", "write some")
        return
    files = [row["path"] for row in rows if row.get("path")]
    missing = [name for name in files[:200] if not os.path.exists(name)]
    yield Finding(
        "data", bool(rows) and not missing and len(files) == len(rows),
        f"{len(rows)} rows, {len(missing)} of {min(len(files), 200)} files missing {missing[:1] or ''}",
        "rows, and all files there", "paths are taken from the working directory; give full ones",
    )  # fmt: skip
    buckets = plan.config.get("bucket_config")
    if not isinstance(buckets, Mapping) or not rows:
        return
    yield _fit(rows, buckets, plan)


def paths(plan: Plan) -> Iterator[Finding]:
    """Weights that are named as files are there."""
    named = {name: plan.section(name).get("from_pretrained") for name in SECTIONS}
    if plan.recipe is not None:
        named["teacher"] = plan.recipe.teacher.from_pretrained
    files = {name: value for name, value in named.items() if isinstance(value, (str, os.PathLike)) and _is_file(value)}
    missing = [f"{name}: {value}" for name, value in files.items() if not os.path.exists(value)]
    yield Finding(
        "paths", not missing, "; ".join(missing) or f"{len(files)} named, all there", "files that are there",
        "paths are taken from the working directory; download the weights, or give a full path",
    )  # fmt: skip


def texts(plan: Plan) -> Iterator[Finding]:
    """Texts that were encoded beforehand are there."""
    encoders = [plan.section(name) for name in ("text_encoder", "t5", "clip")]
    folders = [one.get("folder") for one in encoders if str(one.get("type")).startswith("perflow_encoded")]
    for folder in dict.fromkeys(map(str, folders)):
        try:
            EncodedCaptions(folder, plan.is_second)
        except ValueError as error:
            yield Finding("texts", False, str(error), "encoded captions", "write them once, see docs/recipes.md")
        else:
            yield Finding("texts", True, f"encoded in {folder}")


def checkpoint(plan: Plan) -> Iterator[Finding]:
    """The checkpoint to go on from, and that it has the config's windows."""
    folder = plan.config.get("load")
    if folder is None:
        yield Finding("checkpoint", None, "none to go on from")
        return
    whole = os.path.isfile(os.path.join(folder, "running_states.json"))
    try:
        found = find_state(folder) if whole else None
    except ValueError as error:
        yield Finding("checkpoint", False, str(error), "a readable perflow.json", "restore it")
        return
    yield Finding(
        "checkpoint", whole, f"{folder} {'is whole' if whole else 'has no running_states.json'}", "epochE-global_stepG of "
        "train.py",
        "name a folder that train.py had finished",
    )  # fmt: skip
    recipe = plan.recipe
    if found is None or recipe is None or recipe.curriculum is not None:
        return
    theirs, ours = tuple(found[0].windows), tuple(recipe.windows.edges)
    yield Finding(
        "checkpoint's windows", theirs == ours or recipe.allow_change, f"trained {list(theirs)}, config {list(ours)}", "the "
        "same",
        "the windows' file changed since, or is another one: restore it, or accept the change with allow_change=True",
    )  # fmt: skip


def teacher(plan: Plan) -> Iterator[Finding]:
    """Where the teacher comes from."""
    if plan.recipe is None:
        return
    settings = plan.recipe.teacher
    source = settings.from_pretrained or plan.section("model").get("from_pretrained")
    try:
        found = find_state(source) if isinstance(source, str) else None
    except ValueError as error:
        yield Finding("teacher", False, str(error), "readable weights", "restore perflow.json")
        return
    if source is None:
        yield Finding("teacher", None, "the config names no weights: the teacher's are random")
        return
    yield Finding(
        "teacher", found is None or settings.allow_distilled, f"{source}{', a PeRFlow student' if found else ''}",
        "the original model",
        "name it in teacher=dict(from_pretrained=...), or accept a student with teacher=dict(allow_distilled=True)",
    )  # fmt: skip


def disk(plan: Plan) -> Iterator[Finding]:
    """Room for two checkpoints."""
    folder = Path(plan.config.get("outputs") or "outputs").absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    source = plan.section("model").get("from_pretrained")
    size = os.path.getsize(source) if isinstance(source, str) and os.path.isfile(source) else 0
    needed = f"{2 * CHECKPOINT * size / 2**30:.1f} GiB for two checkpoints" if size else "more than 64 MiB: no weights to go by"
    yield Finding(
        "disk", free > max(2 * CHECKPOINT * size, 2**26), f"{free / 2**30:.1f} GiB free in {folder}", needed,
        "free some, or set outputs to another disk",
    )  # fmt: skip


CHECKS: tuple[Check, ...] = (keys, open_sora, data, paths, texts, checkpoint, teacher, disk)


def check_config(config: Path, root: Path | None = None, arguments: Sequence[str] = ()) -> list[Finding]:
    """All findings of a config.

    Args:
        config: Of train.py. root: Open-Sora checkout; None: the installed one. arguments: train.py's own command line.

    Raises:
        ValueError: `root` is no checkout.
    """
    root = root or imported_tree()
    tag = None if root is None else find_tag(root)
    try:
        plan = Plan(_merged(config, arguments), root, tag)
    except Exception as error:  # a config is a program
        remedy = "mend the file, or name another"
        return [Finding("config", False, f"{type(error).__name__}: {error}", "a config that mmengine reads", remedy)]
    return [finding for check in CHECKS for finding in check(plan)]


def _merged(config: Path, arguments: Sequence[str]) -> dict[str, Any]:
    from mmengine import Config

    merged = Config.fromfile(config, import_custom_modules=False).to_dict()
    for name, value in zip(arguments, arguments[1:]):
        if name.startswith("--"):
            put(merged, name[2:].replace("-", "_"), value)
    return merged


def put(config: dict[str, Any], name: str, value: str) -> None:
    """Set what an option of train.py sets, as far as checks look at it."""
    *sections, last = SHORT.get(name, name).split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[last] = None if value.lower() == "none" else value


def _as_script(plan: Plan) -> Recipe:
    """The recipe, after the early checks of the host, which ask the script that is running (see hosts/script.py)."""

    def main() -> Recipe:
        cfg, booster = plan.config, object()  # noqa: F841  as train.py names them
        if plan.is_second:
            early_2.check_run(cfg)
            return read_config_2(cfg["model"].get("perflow"))[0]
        early_1.check_script(cfg)
        return read_config_1({name: value for name, value in cfg["scheduler"].items() if name != "type"})[0]

    return main()


def _registered(root: Path) -> set[str]:
    """Names of types in a checkout: those that it registers, and its classes, which are registered by their names."""
    found: set[str] = set()
    for file in (root / "opensora").rglob("*.py"):
        text = file.read_text(errors="replace")
        if "register_module" in text:
            found.update(re.findall(r"register_module\(\s*(?:name=)?[\"']([^\"']+)", text))
            found.update(re.findall(r"register_module\(\)\s*(?:def|class)\s+(\w+)", text))
    return found


def _rows(path: Path, header: bool, column: str) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as opened:
        reader = csv.DictReader(opened, None if header else ["path", "text"])
        rows = [row for row, _ in zip(reader, range(MOST_ROWS))]
    if column not in (reader.fieldnames or ()):
        raise ValueError(f"it has no column {column}")
    return rows


def _fit(rows: Sequence[Mapping[str, str]], buckets: Mapping[Any, Any], plan: Plan) -> Finding:
    absent = [name for name in ("num_frames", "height", "width") if name not in rows[0]]
    expected = f"clips for {', '.join(f'{name}: {sorted(frames)} frames' for name, frames in buckets.items())}"
    if absent:
        absence = f"the CSV has no column {', '.join(absent)}"
        return Finding("buckets", False, absence, expected, "add them: Open-Sora sorts by them")
    interval = int(plan.section("dataset").get("frame_interval") or 1)
    sizes = [[float(row[name] or "nan") for name in ("num_frames", "height", "width")] for row in rows]
    fitting = sum(_fits(*size, buckets, interval, plan.is_second) for size in sizes)
    frames, pixels = max(size[0] for size in sizes), max(size[1] * size[2] for size in sizes)
    return Finding(
        "buckets", fitting > 0, f"{fitting} of {len(rows)} clips fit; the longest has {frames:g} frames, the largest "
        f"{pixels:g} pixels",
        expected,
        "add a bucket that they fit, or cut longer and larger clips: a clip needs more frames than frame_interval times the "
        "bucket's, and 80% of its pixels",
    )  # fmt: skip


def _fits(frames: float, height: float, width: float, buckets: Mapping[Any, Any], interval: int, second: bool) -> bool:
    for name, lengths in buckets.items():
        if height * width < APPROXIMATE * _pixels(str(name)):
            continue
        for length in lengths:
            image = length == 1
            long = frames >= length if second else frames > length * interval
            if (frames == 1) if image else long:
                return True
    return False


def _pixels(name: str) -> float:
    """Of a bucket, by its name; 0 where the name does not say."""
    name = name.split("_")[0]
    found = re.fullmatch(r"(\d+)(px|p)?", name)
    if name in NAMED or found is None:
        return NAMED.get(name, 0)
    side = int(found[1])
    return side * round(side * 16 / 9 / 2) * 2 if found[2] == "p" else side * side


def _is_file(value: str | os.PathLike) -> bool:
    text = os.fspath(value)
    return text.startswith((".", "/", "~")) or text.endswith(WEIGHTS)
