"""What the demo leaves in its folder: videos, pictures, weights and numbers."""

import itertools
import json
import logging
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.tools import plots
from opensora_perflow.tools.fonts import labels
from opensora_perflow.tools.outputs import Kind
from opensora_perflow.tools.page import render
from opensora_perflow.tools.page.runs import read_run
from opensora_perflow.training.record import FILE_NAME as RECORD
from opensora_perflow.training.state import METADATA_KEY, StudentState
from opensora_perflow.worlds.clips import FPS, ClipSet, contents, is_written, recognise, tensor_to_frames, write_video
from opensora_perflow.worlds.codec import TinyVAE

logger = logging.getLogger("opensora_perflow")

KNOWN = frozenset(content.caption for content in contents())
"""Captions that the tiny teacher was trained on."""
SHOWN = 6
"""Samples in side_by_side.mp4."""
SECONDS = 8
"""That side_by_side.mp4 lasts at least: the clips are repeated."""
RAW = "its last step's weights"
"""The row of the weights that the average is taken of; not shown in pictures."""
CLIPS = "clips"
KIND = Kind(
    names=(
        "side_by_side.mp4", "frames.png", "training.png", "student.safetensors", RECORD, "report.html", "results.json",
    ),
    marks=("student.safetensors", "results.json"),
    folder=CLIPS,
    is_own=is_written,
)  # fmt: skip
"""Files of a demo; results.json stands for a whole run."""


def is_output(path: Path, videos: Path) -> bool:
    """Whether a file or folder below a folder of videos was written by an earlier demo."""
    if path.is_dir():
        return KIND.wrote(path)
    return KIND.wrote(videos) and KIND.belongs(path.relative_to(videos))


def unknown_captions(captions: list[str]) -> list[str]:
    """The captions that the tiny teacher does not know, each once, in their order."""
    return [caption for caption in dict.fromkeys(captions) if caption not in KNOWN]


def warn_of_unknown(captions: list[str]) -> None:
    """Say once which captions the tiny teacher does not know."""
    unknown = unknown_captions(captions)
    if unknown:
        shown = "; ".join(repr(caption[:80]) for caption in unknown[:5]) + ("; ..." if len(unknown) > 5 else "")
        logger.warning(
            "the demo's tiny teacher knows %d captions, from %r on. It does not know %d of your %d: %s. Its videos of these, "
            "and the student's, show nothing of your clips. The row 'your clips' does.",
            len(KNOWN), contents()[0].caption, len(unknown), len(set(captions)), shown,
        )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a demo has computed.

    result: The numbers, as they go to results.json.
    samples: Sampler -> latents; the reference is not shown.
    prompts: Of the samples.
    student, state, history: The trained network, what its weights hold, and its loss in each step.
    own_clips: The user's clips; None where the demo wrote its own.
    """

    result: dict[str, Any]
    samples: dict[str, Tensor]
    prompts: list[str]
    student: nn.Module
    state: StudentState
    history: list[float]
    own_clips: ClipSet | None


@torch.no_grad()
def write(folder: Path, outcome: Outcome, vae: TinyVAE) -> None:
    """Videos, pictures and weights."""
    nfe = {row["sampler"]: row["nfe"] for row in outcome.result["samplers"]}
    rows = {
        f"{name}\n{nfe[name]} evaluations": latents
        for name, latents in itertools.islice(outcome.samples.items(), 1, None)
        if name != RAW
    }
    shown = write_frames(folder, rows, outcome.prompts, vae, outcome.own_clips)
    video = plots.side_by_side(shown, labels(outcome.prompts[:SHOWN]))
    write_video(folder / "side_by_side.mp4", np.tile(video, (-(-SECONDS * FPS // len(video)), 1, 1, 1)), fps=FPS)
    plots.training_figure(folder / "training.png", outcome.history, outcome.result["windows"])
    metadata = {"format": "pt", METADATA_KEY: outcome.state.to_json()}
    write_state_dict(folder / "student.safetensors", outcome.student.state_dict(), metadata)
    outcome.result["loss"]["history"] = [float(f"{loss:.6g}") for loss in outcome.history]


@torch.no_grad()
def write_frames(
    folder: Path, rows: dict[str, Tensor], prompts: list[str], vae: TinyVAE, own_clips: ClipSet | None = None
) -> dict[str, np.ndarray]:
    """Write frames.png of latents, and return the frames of each row, uint8 [SHOWN, T, H, W, 3]."""
    shown = {name: tensor_to_frames(vae.decode(latents[:SHOWN])) for name, latents in rows.items()}
    if own_clips is not None:
        shown = {"your clips": clips_of(own_clips, prompts[:SHOWN]), **shown}
    plots.frames_figure(folder / "frames.png", shown, labels(prompts[:SHOWN])[:3])
    return shown


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """The numbers with the versions behind them, and the page that shows all of the folder."""
    result["versions"] = {"Python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    (folder / "results.json").write_text(json.dumps(result, indent=1))
    render.write([read_run(folder, Path(result["settings"]["out"]).resolve().name)], folder / render.FILE_NAME)


def clips_of(clips: ClipSet, prompts: list[str]) -> np.ndarray:
    """The first clip of each prompt, uint8 [N, T, H, W, 3]."""
    return clips.frames[[clips.captions.index(prompt) for prompt in prompts]]


@torch.no_grad()
def as_described(vae: TinyVAE, samples: Tensor, prompts: list[str]) -> float | None:
    """Share of samples that show the colour, shape and direction of their prompt; None for prompts of other clips."""
    if unknown_captions(prompts):
        return None
    shown = (recognise(frames).caption for frames in tensor_to_frames(vae.decode(samples)))
    return sum(seen == prompt for seen, prompt in zip(shown, prompts)) / len(prompts)


def table(result: dict[str, Any]) -> str:
    """The result in a few lines for the terminal."""
    lines = [f"{'':27}{'NFE':>5}{'CPU s/sample':>14}{'endpoint error':>16}{'energy distance':>17}{'as described':>14}"]
    for row in result["samplers"]:
        share = "-" if row["as_described"] is None else f"{row['as_described']:.0%}"
        lines.append(
            f"{row['sampler']:27}{row['nfe']:5d}{row['seconds_per_sample']:14.3f}"
            f"{row['endpoint_error']:16.4f}{row['energy_distance']:17.5f}{share:>14}"
        )
    windows = [(f"{row['t_start']:.3g}-{row['t_end']:.3g}", row["motion"]) for row in result["windows"]]
    shares = (f"{name} {m['student'] / m['teacher']:.0%}" if m["teacher"] > 0 else f"{name} -" for name, m in windows)
    return "\n".join([*lines, f"the student's motion, in parts of the teacher's, by window: {', '.join(shares)}"])
