"""`opensora-perflow export`: a student's averaged weights (EMA) as a checkpoint that Open-Sora's loaders take.

Open-Sora's train.py writes the average as one file in the checkpoint folder. Its inference.py and later trainings look for a
folder with model/ in it, or take the file for something else: v1.2 asks Hugging Face's loader for every path that is no
folder (v1.2.0 opensora/models/stdit/stdit3.py:450).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.hosts.script import ema_decay_of
from opensora_perflow.hosts.v2.lora import CONFIG, lora_folder, weights_in
from opensora_perflow.tools.layouts import FILES, check_free, write_lora, write_weights
from opensora_perflow.training.state import StudentState, averages_beside, find_state

logger = logging.getLogger("opensora_perflow")

STALE = 0.05
"""Share of the first weights in an average, above which the average is no student yet."""


def export(checkpoint: Path, out: Path, ema: bool = True) -> None:
    """Write OUT/model/model.safetensors and OUT/perflow.json. OUT appears as a whole, or not at all.

    A checkpoint of Open-Sora 2.0's adapters becomes OUT/lora and OUT/perflow.json.

    Args:
        checkpoint: A folder epochE-global_stepG of a PeRFlow training.
        out: A folder that does not exist yet.
        ema: Whether to write the average, or the weights of the last step.

    Raises:
        ValueError: no such checkpoint, no average in it or one that never moved, or OUT exists. OSError: OUT cannot be written.
    """
    if out.suffix in FILES:
        raise ValueError(f"an export is a folder, got --out {str(out)!r}; name a folder")
    check_free(out)
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is no folder; name the folder epochE-global_stepG that train.py wrote")
    weights, state = student(checkpoint, ema)
    folder = lora_folder(checkpoint)
    if folder is None:
        write_weights(out, weights, state)
    else:
        write_lora(out, weights, (folder / CONFIG).read_text(), state)


def student(checkpoint: Path, ema: bool) -> tuple[dict[str, Tensor], StudentState]:
    """The weights of a checkpoint folder, and what belongs to them; see `export`.

    Raises:
        ValueError: see `export`.
    """
    found = find_state(checkpoint)
    if found is None:
        raise ValueError(
            f"{checkpoint} has no perflow.json, so nothing is known of the windows of its weights; name a checkpoint of a "
            "PeRFlow training, epochE-global_stepG"
        )
    folder = lora_folder(checkpoint)
    raw = read_state_dict(checkpoint if folder is None else weights_in(folder))
    return (_average(checkpoint, raw, found[0]) if ema else raw), found[0]


def _average(checkpoint: Path, raw: Mapping[str, Tensor], state: StudentState) -> dict[str, Tensor]:
    file = averages_beside(checkpoint)
    if file is None:
        raise ValueError(
            f"{checkpoint} holds no averaged weights: its training had no ema_decay; --no-ema writes those of its last step"
        )
    average = read_state_dict(file)
    _check_average(file, average, raw)
    decay = ema_decay_of(checkpoint)
    if decay is not None and state.steps and decay**state.steps > STALE:
        logger.warning(
            "%s still holds %.0f%% of the weights that the training began with: %d steps are few for ema_decay=%g; see the "
            "rule in docs/recipes.md, or write the weights of the last step with --no-ema",
            file, 100 * decay**state.steps, state.steps, decay,
        )  # fmt: skip
    return average


def _check_average(file: Path, average: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> None:
    dtypes = {value.dtype for value in average.values() if value.dtype != torch.float32}
    if dtypes:
        raise ValueError(
            f"{file} is {', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}, in which an average does "
            "not move: it is the network that the training began with; --no-ema writes the weights of the last step"
        )
    shapes, expected = ({name: list(value.shape) for name, value in of.items()} for of in (average, raw))
    if shapes != expected:
        name = next(name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name))
        raise ValueError(
            f"{file} is not the average of the weights beside it: {name} is {shapes.get(name, 'missing')}, there "
            f"{expected.get(name, 'missing')}; a process's own part of an average, or a file of another run, is no student"
        )
    broken = [name for name, value in average.items() if torch.isfinite(raw[name]).all() and not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"{file} holds NaN or infinity in {broken[0]}: the training diverged; export an earlier checkpoint")
