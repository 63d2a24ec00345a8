"""Students of the tiny video model: where they are, and one prompt through a student and the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opensora_perflow.checks import check_num_steps, whole
from opensora_perflow.hosts.v1.timestep_transform import shift_ratio
from opensora_perflow.hosts.v1.weights import ZERO_AT_FIRST, as_loaded, read_source
from opensora_perflow.method.metrics import endpoint_error
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.registry import SCHEDULERS, build_module
from opensora_perflow.tools import compare, export, report
from opensora_perflow.tools.demo_settings import DemoSettings
from opensora_perflow.tools.page.runs import Run
from opensora_perflow.tools.probes import LATENT_SHAPE, guided_field, sizes
from opensora_perflow.training.recipe import Guidance
from opensora_perflow.training.state import FILE_NAME, StudentState, averages_beside, find_state
from opensora_perflow.worlds.clips import tensor_to_frames
from opensora_perflow.worlds.codec import TinyVAE
from opensora_perflow.worlds.model import load_teacher
from opensora_perflow.worlds.text import TinyTextEncoder

MOST_STEPS = 16
TEACHER_STEPS = 30
"""Of the sampler that Open-Sora's users have."""
TINY = 192
"""Sides of the tiny configs' videos, whose VAE makes the latents of the demo's 64 x 64."""
GUIDANCE = DemoSettings.guidance_scale
"""Of the teacher, where a student says nothing of it."""
STUDENT_FILE = "student.safetensors"


@dataclass(frozen=True)
class Shown:
    """One sampler's video.

    frames: uint8 [T, H, W, 3]. error: Distance to the end of the teacher's fine path. as_described: Does the video show its
    prompt? None: the prompt is none that the teacher knows.
    """

    name: str
    frames: np.ndarray
    nfe: int
    seconds: float
    error: float
    as_described: bool | None


@dataclass(frozen=True)
class Comparison:
    """videos: Of teacher and student, from the same noise. run: Windows and paths, as the report's charts take them.
    notes: What a user should know of these settings."""

    prompt: str
    videos: list[Shown]
    run: Run
    notes: list[str]


def find_students(places: Sequence[Path]) -> dict[str, Path]:
    """Checkpoints in the folders of demos and trainings, by the name that they are chosen by, the newest first.

    Args:
        places: Folders of demos, of trainings or of checkpoints, or files; those that are not there yet have none.
    """
    found: list[Path] = []
    for place in places:
        inside = [path.parent for path in place.glob(f"*/{FILE_NAME}")] if place.is_dir() else []
        own = [place] if place.is_file() or (place / FILE_NAME).is_file() else []
        demo = [place / STUDENT_FILE] if (place / STUDENT_FILE).is_file() else []
        found += [*demo, *own, *sorted(inside, key=lambda path: path.stat().st_mtime, reverse=True)]
    return {str(path): path for path in found}


class Studio:
    """The tiny teacher, and the student that was sampled last."""

    def __init__(self) -> None:
        self.teacher, self.vae, self.text_encoder = load_teacher(), TinyVAE().eval(), TinyTextEncoder()
        self.text_encoder.y_embedder = self.teacher.y_embedder
        self._student: tuple[tuple[Path, float], nn.Module, StudentState] | None = None

    def compare(self, checkpoint: Path, prompt: str, steps: int, seed: int) -> Comparison:
        """One prompt from the same noise: the teacher in 30 steps, in as many as the student, and the student.

        Args:
            checkpoint: See `find_students`.
            steps: Of the student, 1 to MOST_STEPS. seed: Of the noise, >= 0.

        Raises:
            ValueError: no prompt, steps or seed out of range, or a checkpoint that is no student of the tiny model.
        """
        check_num_steps(steps, "the student's steps")
        whole(0)("the seed", seed)
        if steps > MOST_STEPS or not prompt.strip():
            raise ValueError(f"a prompt and 1 to {MOST_STEPS} steps are needed, got {prompt!r} and {steps}")
        prompt = " ".join(prompt.lower().split())
        network, state = self._load(checkpoint)
        scheduler, scale = scheduler_of(state, steps)
        noise = torch.randn(1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))
        batch, edges = compare.Batch(noise, [prompt], sizes(1)), scheduler.windows.edges
        path = compare.teacher_path(self.teacher, self.text_encoder, batch, scale, edges)
        samplers = {
            f"teacher, {TEACHER_STEPS} steps": (compare.teacher_sampler(TEACHER_STEPS, scale), self.teacher),
            f"teacher, {steps} steps": (compare.teacher_sampler(steps, scale), self.teacher),
            f"student, {steps} steps": (scheduler, network),
        }
        sampled = {name: compare.sample(*pair, self.text_encoder, batch) for name, pair in samplers.items()}
        fields = [
            guided_field(one, self.text_encoder, [prompt], batch.sizes, own_scale)
            for one, own_scale in ((self.teacher, scale), (network, 1.0 if state.guidance["mode"] == "fixed" else scale))
        ]
        result = {
            "paths": compare.drawn_paths(path, sampled[f"student, {steps} steps"], [prompt]),
            "windows": compare.window_errors(edges, *fields, path.at(edges)),
        }
        notes = list(scheduler.settings.crossing)
        if report.unknown_captions([prompt]):
            notes.append(f"The tiny teacher does not know {prompt!r}. It knows prompts such as {min(report.KNOWN)!r}.")
        shown = [self._shown(name, one, path.end, prompt) for name, one in sampled.items()]
        return Comparison(prompt, shown, Run(checkpoint.name, result), notes)

    @torch.no_grad()
    def _shown(self, name: str, sampled: compare.Sampled, end: Tensor, prompt: str) -> Shown:
        share = report.as_described(self.vae, sampled.latents, [prompt])
        frames = tensor_to_frames(self.vae.decode(sampled.latents))[0]
        error = endpoint_error(sampled.latents, end)
        return Shown(name, frames, sampled.nfe, sampled.seconds, error, None if share is None else share == 1)

    def _load(self, checkpoint: Path) -> tuple[nn.Module, StudentState]:
        """The network with a student's weights (the average of a training's, where there is one), and what belongs to them."""
        changed = (checkpoint, checkpoint.stat().st_mtime)
        if self._student is not None and self._student[0] == changed:
            return self._student[1:]
        found = find_state(checkpoint)
        if found is None:
            raise ValueError(f"{checkpoint} has no {FILE_NAME}, which names its windows; choose one of a PeRFlow training")
        if checkpoint.is_dir():
            weights, _ = export.student(checkpoint, ema=averages_beside(checkpoint) is not None)
        else:
            weights = read_source(checkpoint)
        network = load_teacher()
        weights = {name: value for name, value in as_loaded(weights, network).items() if name not in ZERO_AT_FIRST}
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"{checkpoint} is no student of the tiny model (96 channels, depth 3), which is what the studio samples: "
                f"{str(error).splitlines()[1].strip()[:200]}; sample others with Open-Sora's scripts/inference.py"
            ) from error
        self._student = changed, network, found[0]
        return self._student[1:]


def scheduler_of(state: StudentState, steps: int) -> tuple[Any, float]:
    """The sampler of a student of the tiny model, and the teacher's guidance scale.

    Students of the tiny configs learned windows that Open-Sora's timestep transform warps. Their edges are taken to flow time,
    where the demo's are.

    Raises:
        ValueError: a scale for each window, which the teacher's own sampler does not take.
    """
    guidance = Guidance.recorded(state.guidance, len(state.windows) - 1)
    scale = guidance.scale if guidance.mode == "fixed" else GUIDANCE if state.cfg_scale is None else state.cfg_scale
    if isinstance(scale, tuple):
        raise ValueError(f"the studio guides the teacher with one scale, and this student has several, {scale}")
    edges = list(state.windows)
    if state.transform is not None:
        ratio = shift_ratio(sizes(1, height=TINY, width=TINY), **state.transform)
        edges = WarpedWindows(TimeWindows(edges), 1, ratio).edges[:, 0].tolist()
    config = dict(type="perflow", windows=edges, num_sampling_steps=steps, cfg_scale=scale, prediction=state.prediction)
    return build_module({**config, "guidance": asdict(guidance)}, SCHEDULERS), float(scale)
