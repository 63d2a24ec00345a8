"""The demo: distil a tiny video teacher into a 4-step student, sample both from the same noise, and show the difference.

Clips, network, VAE and text encoder are small; the scheduler is the PeRFlow object that Open-Sora builds, called the way its
train.py and inference.py call it.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.checks import check_num_steps, check_number
from opensora_perflow.hosts.v1.conditions import sampling_condition
from opensora_perflow.hosts.v1.stdit import velocity_field
from opensora_perflow.method.grids import linear_grid
from opensora_perflow.method.metrics import endpoint_error, energy_distance, temporal_difference_energy
from opensora_perflow.method.motion import motion_report
from opensora_perflow.method.solvers import solve
from opensora_perflow.registry import SCHEDULERS, build_module
from opensora_perflow.tools import plots
from opensora_perflow.training.state import METADATA_KEY, StudentState
from opensora_perflow.worlds.clips import (
    FPS,
    ClipSet,
    contents,
    frames_to_tensor,
    read_clips,
    recognise,
    tensor_to_frames,
    write_clips,
    write_video,
)
from opensora_perflow.worlds.codec import TinyVAE
from opensora_perflow.worlds.model import WEIGHTS, TinySTDiT, load_teacher
from opensora_perflow.worlds.text import TinyTextEncoder

logger = logging.getLogger("opensora_perflow")

REFERENCE_STEPS = 512
"""Steps of the guided teacher that the others are compared with."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; every field is an option of `opensora-perflow demo`."""

    videos: Path | None = None
    """Folder of videos (or a CSV with path and text); None writes clips of moving shapes."""
    out: Path = Path("perflow_demo")
    """Folder for everything that is written."""
    open_sora: Path | None = None
    """Root of an Open-Sora v1.2.0 or v1.3 checkout, whose STDiT3 class then takes the place of the small copy of it."""
    iterations: int = 240
    """Training steps, >= 1."""
    batch_size: int = 16
    """Clips per training step, >= 1."""
    lr: float = 2e-4
    """Peak learning rate, > 0."""
    num_clips: int = 64
    """Clips to write where no videos are given, >= 1."""
    num_samples: int = 32
    """Samples that are compared, >= 2."""
    guidance_scale: float = 3.0
    """Scale of the teacher, folded into the student."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "num_clips", "num_samples"):
            check_num_steps(getattr(self, name), name)
        if self.num_samples < 2:
            raise ValueError(f"num_samples must be >= 2, to compare distributions, got {self.num_samples}")
        check_number("lr", self.lr, low=0)
        check_number("guidance_scale", self.guidance_scale, low=0)


@dataclass(frozen=True)
class Batch:
    """Noise and prompts that every sampler gets, with the sizes that Open-Sora's scripts send along."""

    noise: Tensor
    prompts: list[str]
    sizes: dict[str, Tensor]


def run(settings: DemoSettings) -> dict[str, Any]:
    """Run the demo and return what it wrote to results.json.

    Raises:
        ValueError: invalid settings, no readable video, or an Open-Sora checkout without STDiT3. Raised before anything in
            the output folder is touched, except by videos that turn out to be unreadable.
    """
    began = time.perf_counter()
    torch.manual_seed(settings.seed)
    vae, text_encoder, teacher = TinyVAE().eval(), TinyTextEncoder(), build_network(settings.open_sora)
    clips = _clips(settings)
    with torch.no_grad():
        pixels = frames_to_tensor(clips.frames)
        latents = torch.cat([vae.encode(part) for part in tqdm(pixels.split(8), desc="encoding clips", unit="batch")])
    text_encoder.y_embedder = teacher.y_embedder
    height, width = clips.frames.shape[2:4]
    num_frames = clips.frames.shape[1]

    scheduler = build_module(
        dict(
            type="perflow",
            windows=4,
            guidance=dict(mode="fixed", scale=settings.guidance_scale),
            draws=dict(seed=settings.seed),
        ),
        SCHEDULERS,
    )
    student = build_network(settings.open_sora)
    batch = _sampling_batch(settings, clips.captions, latents.shape[1:], (num_frames, height, width))
    path = _teacher_path(teacher, text_encoder, batch, settings, scheduler.windows.edges)
    history = _train(scheduler, student, text_encoder, latents, clips, settings, (num_frames, height, width))

    samplers = {
        f"teacher, {REFERENCE_STEPS} steps": (REFERENCE_STEPS, 2, None),
        "teacher, 30 steps": (30, 2, teacher),
        "teacher, 4 steps": (4, 2, teacher),
        "student, 4 steps": (4, 1, student),
    }
    samples, rows = {}, []
    for name, (steps, branches, network) in samplers.items():
        start = time.perf_counter()
        if network is None:
            samples[name], seconds = path.states[-1], path.seconds
        else:
            own = scheduler if network is student else _teacher_sampler(steps, settings.guidance_scale)
            with torch.no_grad():
                samples[name] = own.sample(
                    network, text_encoder, batch.noise, batch.prompts, "cpu", additional_args=batch.sizes, progress=False
                )
            seconds = time.perf_counter() - start
        rows.append(
            {
                "sampler": name,
                "nfe": steps * branches,
                "seconds_per_sample": seconds / len(batch.noise),
                "endpoint_error": endpoint_error(samples[name], path.states[-1]),
                "energy_distance": energy_distance(samples[name], path.states[-1]),
                "motion_energy": temporal_difference_energy(samples[name]),
                "as_described": _as_described(vae, samples[name], batch.prompts),
            }
        )
    windows = _window_errors(scheduler, teacher, student, text_encoder, batch, path)
    result = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "samplers": rows,
        "windows": windows,
        "loss": {"first": float(np.mean(history[:10])), "last": float(np.mean(history[-10:]))},
        "network": type(student).__module__.split(".")[0] + "." + type(student).__name__,
        "seconds": time.perf_counter() - began,
    }
    _write(settings.out, result, samples, batch, vae, student, scheduler.state(), history)
    result["seconds"] = time.perf_counter() - began
    (settings.out / "results.json").write_text(json.dumps(result, indent=1))
    return result


@dataclass(frozen=True)
class TeacherPath:
    """The guided teacher's states at every window edge, from fine steps, and the seconds that they took."""

    states: list[Tensor]
    seconds: float


def build_network(open_sora: Path | None) -> nn.Module:
    """A network with the shipped weights: the small copy of STDiT3, or the real class from a checkout."""
    if open_sora is None:
        return load_teacher()
    root = Path(open_sora).resolve()
    if not (root / "opensora" / "models" / "stdit" / "stdit3.py").is_file():
        raise ValueError(f"--open-sora must be the root of an Open-Sora v1.2.0 or v1.3 checkout, got {str(root)!r}")
    from opensora_perflow import portable

    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    portable.activate()
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    from opensora_perflow.checkpoints import read_state_dict

    network = STDiT3(STDiT3Config(**TinySTDiT().host_config())).eval()
    missing, unexpected = network.load_state_dict(read_state_dict(WEIGHTS), strict=False)
    # v1.3 adds embedders of reference frames, zero until they are trained.
    if unexpected or any(not key.startswith("x_embedder_cond") for key in missing):
        raise ValueError(f"the shipped weights do not fit {root}'s STDiT3: missing {missing[:3]}, unknown {unexpected[:3]}")
    return network


def _clips(settings: DemoSettings) -> ClipSet:
    if settings.videos is not None:
        return read_clips(settings.videos)
    return read_clips(write_clips(settings.out / "clips", settings.num_clips, seed=settings.seed))


def _sizes(batch_size: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    num_frames, height, width = shape
    values = {"num_frames": num_frames, "height": height, "width": width, "ar": height / width, "fps": FPS}
    return {key: torch.full((batch_size,), float(value)) for key, value in values.items()}


def _sampling_batch(
    settings: DemoSettings, captions: list[str], latent_shape: torch.Size, shape: tuple[int, int, int]
) -> Batch:
    generator = torch.Generator().manual_seed(settings.seed + 1)
    noise = torch.randn(settings.num_samples, *latent_shape, generator=generator)
    distinct = sorted(set(captions))
    order = torch.randperm(len(distinct), generator=generator).tolist()
    prompts = [distinct[order[i % len(distinct)]] for i in range(settings.num_samples)]
    return Batch(noise, prompts, _sizes(settings.num_samples, shape))


def _teacher_sampler(steps: int, guidance_scale: float) -> Any:
    """The teacher's own sampler: one window and guidance make `perflow` Open-Sora's rflow (benchmarks/sampler_parity.py)."""
    return build_module(dict(type="perflow", windows=1, num_sampling_steps=steps, cfg_scale=guidance_scale), SCHEDULERS)


def _guided(network: nn.Module, text_encoder: Any, batch: Batch, scale: float) -> Any:
    condition = sampling_condition(
        network, text_encoder, batch.prompts, negative_prompts=None, additional_args=batch.sizes, reference=None,
        needs_null=scale != 1.0,
    )  # fmt: skip
    return velocity_field(network, network, condition, num_timesteps=1000, text_scale=scale)


@torch.no_grad()
def _teacher_path(
    teacher: nn.Module, text_encoder: Any, batch: Batch, settings: DemoSettings, edges: tuple[float, ...]
) -> TeacherPath:
    start = time.perf_counter()
    velocity = _guided(teacher, text_encoder, batch, settings.guidance_scale)
    states = [batch.noise]
    each = REFERENCE_STEPS // (len(edges) - 1)
    with tqdm(total=REFERENCE_STEPS, desc="teacher's fine path", unit="step") as bar:
        for t_start, t_end in zip(edges, edges[1:]):
            ends = (torch.full((len(batch.noise),), edge, dtype=torch.float64) for edge in (t_start, t_end))
            grid, x = linear_grid(*ends, each), states[-1]
            for i in range(each):
                x = solve(velocity, x, grid[i : i + 2])
                bar.update()
            states.append(x)
    return TeacherPath(states, time.perf_counter() - start)


def _train(
    scheduler: Any,
    student: nn.Module,
    text_encoder: Any,
    latents: Tensor,
    clips: ClipSet,
    settings: DemoSettings,
    shape: tuple[int, int, int],
) -> list[float]:
    """Distil; returns the loss of each step. The calls are those of Open-Sora's train.py."""
    student.train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    warmup = min(20, settings.iterations)
    # Warm-up, then a cosine down to zero: the last steps average the noise of the small batches.
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / settings.iterations)),
    )
    encoded = text_encoder.encode(clips.captions)
    generator = torch.Generator().manual_seed(settings.seed + 2)
    history: list[float] = []
    with tqdm(total=settings.iterations, desc="training the student", unit="step") as bar:
        for _ in range(settings.iterations):
            index = torch.randint(len(latents), (settings.batch_size,), generator=generator)
            model_args = {**{key: value[index] for key, value in encoded.items()}, **_sizes(len(index), shape)}
            loss = scheduler.training_losses(student, latents[index], model_args)["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rate.step()
            history.append(loss.item())
            bar.set_postfix(loss=f"{np.mean(history[-20:]):.4f}")
            bar.update()
    student.eval()
    return history


@torch.no_grad()
def _as_described(vae: TinyVAE, samples: Tensor, prompts: list[str]) -> float | None:
    """Share of samples that show the colour, shape and direction of their prompt; None for prompts of other clips."""
    known = {content.caption for content in contents()}
    if not set(prompts) <= known:
        return None
    shown = (recognise(frames).caption for frames in tensor_to_frames(vae.decode(samples)))
    return sum(seen == prompt for seen, prompt in zip(shown, prompts)) / len(prompts)


@torch.no_grad()
def _window_errors(
    scheduler: Any, teacher: nn.Module, student: nn.Module, text_encoder: Any, batch: Batch, path: TeacherPath
) -> list[dict[str, float]]:
    """Error of one step across each window, from the teacher's own state at its noisy edge, and the motion it points at."""
    edges = scheduler.windows.edges
    fields = {
        "teacher": _guided(teacher, text_encoder, batch, scheduler.recipe.guidance.scale),
        "student": _guided(student, text_encoder, batch, 1.0),
    }
    rows = []
    for k, (t_start, t_end) in enumerate(zip(edges, edges[1:])):
        times = torch.tensor([[t_start], [t_end]], dtype=torch.float64).expand(2, len(batch.noise))
        row = {"t_start": t_start, "t_end": t_end}
        for name, velocity in fields.items():
            row[name] = endpoint_error(solve(velocity, path.states[k], times), path.states[k + 1])
        rows.append(row)
    motion = motion_report(fields["student"], path.states, torch.tensor(edges, dtype=torch.float64))
    return [{**row, "motion": asdict(window)} for row, window in zip(rows, motion)]


@torch.no_grad()
def _write(
    out: Path,
    result: dict[str, Any],
    samples: dict[str, Tensor],
    batch: Batch,
    vae: TinyVAE,
    student: nn.Module,
    state: StudentState,
    history: list[float],
) -> None:
    """Videos, pictures and weights; results.json comes last, so that it stands for a whole run."""
    out.mkdir(parents=True, exist_ok=True)
    shown = {name: samples[name] for name in samples if not name.startswith(f"teacher, {REFERENCE_STEPS}")}
    videos = {name: tensor_to_frames(vae.decode(value[:6])) for name, value in shown.items()}
    nfe = {row["sampler"]: row["nfe"] for row in result["samplers"]}
    labels = {name: f"{name}\n{nfe[name]} evaluations" for name in videos}
    side_by_side = plots.side_by_side({labels[name]: frames for name, frames in videos.items()}, batch.prompts[:6])
    write_video(out / "side_by_side.mp4", side_by_side, fps=FPS)
    plots.frames_figure(out / "frames.png", {labels[n]: v for n, v in videos.items()}, batch.prompts[:3])
    plots.training_figure(out / "training.png", history, result["windows"])
    metadata = {"format": "pt", METADATA_KEY: state.to_json()}
    write_state_dict(out / "student.safetensors", student.state_dict(), metadata)


def table(result: dict[str, Any]) -> str:
    """The result in a few lines for the terminal."""
    lines = [f"{'':24}{'NFE':>6}{'s/sample':>10}{'endpoint error':>16}{'energy distance':>17}{'as described':>14}"]
    for row in result["samplers"]:
        share = "-" if row["as_described"] is None else f"{row['as_described']:.0%}"
        lines.append(
            f"{row['sampler']:24}{row['nfe']:6d}{row['seconds_per_sample']:10.3f}"
            f"{row['endpoint_error']:16.4f}{row['energy_distance']:17.5f}{share:>14}"
        )
    windows = [(f"{row['t_start']:g}-{row['t_end']:g}", row["motion"]) for row in result["windows"]]
    shares = (f"{name} {m['student'] / m['teacher']:.0%}" if m["teacher"] > 0 else f"{name} -" for name, m in windows)
    return "\n".join([*lines, f"the student's motion, in parts of the teacher's, by window: {', '.join(shares)}"])
