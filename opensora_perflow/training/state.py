"""What a student's weights do not say: the windows that they belong to, who taught them, and how far the training has come.

Kept as perflow.json in the checkpoint folder of Open-Sora (epochE-global_stepG), beside running_states.json. What that folder
holds (model/, ema.pt) shares it, and no loader of any tag looks there. A .safetensors file has the same text in its metadata.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from opensora_perflow import __version__
from opensora_perflow.atomic import replacing
from opensora_perflow.checkpoints import read_metadata
from opensora_perflow.checks import (
    as_scales,
    check_keys,
    choice,
    data,
    key,
    number,
    optional,
    parse_json,
    read_bounded,
    shown,
    whole,
    words,
)
from opensora_perflow.method.ddpm import PREDICTIONS
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.training.curriculum import progress

logger = logging.getLogger("opensora_perflow")

FILE_NAME = "perflow.json"
METADATA_KEY = "perflow"
FORMAT = 1
PARTS = ("model", "lora")
"""Folders of weights in a checkpoint folder."""
AVERAGES = ("ema.safetensors", "ema.pt")
"""Files of averaged weights in a checkpoint folder, in the order in which Open-Sora looks for them."""

FOR_RESUMING = ("windows", "transform", "path", "prediction", "guidance", "teacher", "adapters")
"""What must not change within one training."""
FOR_SAMPLING = ("windows", "transform", "path", "prediction")
"""What the sampler must share with the training; of the guidance, its mode."""


def _settings(name: str, value: Any) -> dict[str, Any]:
    """Keys of the config, as they come back from JSON: lists for tuples, dict for ConfigDict."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dict, got {shown(value)}")
    return data(name, value)


def _draws(name: str, value: Any) -> dict[str, Any]:
    found = _settings(name, value)
    if "seed" in found:
        found["seed"] = optional(whole(None, 2**64, accepted="an integer or None"))(f"{name}.seed", found["seed"])
    return found


@dataclass(frozen=True)
class StudentState:
    """All of it survives JSON.

    Raises:
        ValueError: a value of another type than is said here, or windows that are none.
    """

    windows: Sequence[float] = key(MISSING, lambda name, value: TimeWindows(value).edges)
    """Edges in untransformed time, from 1 to 0."""
    transform: dict[str, Any] | None = key(MISSING, optional(_settings))
    """The host's timestep transform that the edges pass through: formula, scale, scale_temporal; None: they do not."""
    path: str = key(MISSING, choice("linear", "ddpm"))
    """linear or ddpm."""
    prediction: str = key(MISSING, choice(*PREDICTIONS))
    guidance: dict[str, Any] = key(MISSING, _settings)
    """The keys of recipe.Guidance."""
    cfg_scale: Any = key(None, optional(as_scales))
    """Guidance by which the student came to its starts in training, where it is guided in sampling too (mode sync): a number,
    or one a window; None: no such guidance, or not known."""
    image_cfg_scale: float | None = key(None, optional(number(low=0)))
    """As cfg_scale, by reference frames; of Open-Sora 2.0's students alone."""
    teacher: str | None = key(None, optional(words))
    """teacher.fingerprint of its weights; None before there is one."""
    teacher_source: str | None = key(None, optional(words))
    """Where they came from, in words."""
    stage: int = key(1, whole())
    """1: the teacher is an original model; 2: it is a student of stage 1; and so on."""
    curriculum: dict[str, Any] | None = key(None, optional(progress))
    """curriculum.Curriculum.state, where there is one; `windows` are those of its stage."""
    objective: Any = key(None, data)
    draws: dict[str, Any] = field(default_factory=dict, metadata={"kind": _draws})
    """The keys of recipe.Draws, and the seed that was really used."""
    steps: int = key(0, whole(0))
    """Training steps so far: calls of training_losses, in each process."""
    adapters: dict[str, Any] | None = key(None, optional(_settings))
    """Where the weights are adapters alone: their rank, alpha and targets, and `base`, teacher.digest of the weights that they
    add to; None: a whole network."""
    version: str = key(__version__, words)
    """Of the package that wrote it."""

    def __post_init__(self) -> None:
        check_keys(self)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> StudentState:
        """Raises ValueError where the text is not what `to_json` writes."""
        try:
            values = parse_json(text)
            found = values.pop("format")
            if found == FORMAT:
                known = {f.name for f in fields(cls)}
                return cls(**{one: value for one, value in values.items() if one in known})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where} is not a state that opensora_perflow wrote ({type(error).__name__}: {error}); restore it, or "
                "remove it to use the weights without it"
            ) from error
        raise ValueError(f"{where} has format {shown(found)}, this version reads {FORMAT}; update opensora_perflow")

    def differences(self, other: StudentState, names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
        """name -> (this one's value, the other's), of those that are not the same."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def write_state(folder: str | os.PathLike, state: StudentState) -> None:
    """Write `folder`/perflow.json, atomically.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(folder) / FILE_NAME
    try:
        with replacing(path) as temporary:
            temporary.write_text(state.to_json() + "\n")
    except OSError as error:
        raise OSError(
            f"cannot write {path} ({error}), without which the checkpoint would not say which windows its weights belong to; "
            "nothing of it was saved: see to the disk, and start again from the last checkpoint with --load"
        ) from error


def find_state(weights: str | os.PathLike) -> tuple[StudentState, Path] | None:
    """The state that belongs to weights, and the file that holds it; None if there is none.

    Args:
        weights: A checkpoint folder, the model/ or lora/ folder in it, a file in those, a .safetensors file of its own,
            or what else a host takes for weights. A repository id has no state.

    Raises:
        ValueError: there is one, and it is unreadable.
    """
    path = Path(weights)
    if path.suffix == ".safetensors" and os.path.isfile(path):
        text = read_metadata(path).get(METADATA_KEY)
        if text is not None:
            return StudentState.from_json(text, f"the metadata of {path}"), path
    own = path if os.path.isdir(path) else path.parent
    folders = [own, own.resolve().parent] if own.resolve().name in PARTS else [own]
    for folder in folders if os.path.exists(path) else ():
        file = folder / FILE_NAME
        if os.path.isfile(file):
            try:
                text = read_bounded(file)
            except OSError as error:
                raise ValueError(f"{file} cannot be read ({error}); see to its permissions, or restore it") from error
            return StudentState.from_json(text, str(file)), file
    return None


def averages_beside(weights: str | os.PathLike) -> Path | None:
    """The file of averaged weights (EMA) in the checkpoint folder that weights are, or lie in; None: no such folder or file."""
    path = Path(weights)
    folder = path.resolve().parent if path.resolve().name in PARTS else path
    return next((folder / name for name in AVERAGES if (folder / name).is_file()), None)


def raw_weights(weights: str | os.PathLike) -> str | None:
    """A warning where weights are those of a training's one step, and its average lies beside them; None elsewhere."""
    file = averages_beside(weights)
    return file and (
        f"{weights} holds the weights of one training step, which jitter at a constant learning rate; their average is in "
        f"{file.name} and errs less: opensora-perflow export {file.parent}"
    )


def check_resumed(found: StudentState, now: StudentState, where: str | os.PathLike, allow_change: bool) -> None:
    """Raises ValueError if a training would go on with other settings than it began with, and that is not allowed."""
    changed = found.differences(now, FOR_RESUMING)
    if not changed:
        return
    if "teacher" in changed:
        changed["teacher"] = tuple(f"{state.teacher} ({state.teacher_source})" for state in (found, now))
    listed = "; ".join(f"{name} was {old}, now {new}" for name, (old, new) in changed.items())
    if not allow_change:
        raise ValueError(
            f"the run that is resumed ({where}) was trained with other settings: {listed}. Set them as they were, or accept "
            "the change with the key allow_change=True"
        )
    logger.warning("PeRFlow goes on with changed settings (allow_change): %s", listed)


def sampling_mismatch(found: StudentState, now: StudentState, where: str | os.PathLike) -> str | None:
    """A warning where a student is sampled with other settings than it was trained with; None where all is well."""
    different = found.differences(now, FOR_SAMPLING)
    modes = found.guidance.get("mode"), now.guidance.get("mode")
    if modes[0] != modes[1]:
        different["guidance mode"] = modes
    if not different:
        return None
    listed = "; ".join(f"{name} trained {old}, asked {new}" for name, (old, new) in different.items())
    return f"the student is sampled with other settings than it was trained with ({where}): {listed}"
