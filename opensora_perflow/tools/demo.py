"""The demo: distil a tiny video teacher into a 4-step student, sample both from the same noise, and show the difference.

Clips, network, VAE and text encoder are small. The scheduler is the PeRFlow object that Open-Sora builds, called the way its
train.py and inference.py call it.
"""

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

from opensora_perflow.checks import check_keys, key, number, whole
from opensora_perflow.method.grids import linear_grid
from opensora_perflow.method.metrics import endpoint_error, energy_distance, temporal_difference_energy
from opensora_perflow.method.motion import motion_report
from opensora_perflow.method.solvers import solve
from opensora_perflow.registry import SCHEDULERS, build_module
from opensora_perflow.tools import outputs, report
from opensora_perflow.tools.probes import guided_field, shuffled, sizes
from opensora_perflow.worlds.clips import ClipSet, frames_to_tensor, name_folder, read_clips, write_clips
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
    iterations: int = key(240, whole())
    """Training steps, >= 1."""
    batch_size: int = key(16, whole())
    """Clips per training step, >= 1."""
    lr: float = key(2e-4, number(low=0))
    """Peak learning rate, > 0."""
    num_clips: int = key(64, whole())
    """Clips to write where no videos are given, >= 1."""
    num_samples: int = key(32, whole())
    """Samples that are compared, >= 2."""
    guidance_scale: float = key(3.0, number(low=0))
    """Scale of the teacher, folded into the student."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_keys(self)
        if self.num_samples < 2:
            raise ValueError(f"num_samples must be >= 2, to compare distributions, got {self.num_samples}")


@dataclass(frozen=True)
class Batch:
    """Noise and prompts that every sampler gets, with the sizes that Open-Sora's scripts send along."""

    noise: Tensor
    prompts: list[str]
    sizes: dict[str, Tensor]


def run(settings: DemoSettings) -> dict[str, Any]:
    """Run the demo and return what it wrote to results.json.

    The output folder is not touched before everything is there: then all of it takes its place at once.

    Raises:
        ValueError: invalid settings, no readable video, an Open-Sora checkout without STDiT3, or an output folder where the
            demo's names are other files.
    """
    began = time.perf_counter()
    torch.manual_seed(settings.seed)
    vae, text_encoder, teacher = TinyVAE().eval(), TinyTextEncoder(), build_network(settings.open_sora)
    clips = None if settings.videos is None else _clips(settings)
    with outputs.together(settings.out, report.KIND) as folder:
        if clips is None:
            clips = _own_clips(settings, folder)
        outcome = _distil_and_compare(settings, clips, vae, text_encoder, teacher)
        report.write(folder, outcome, vae)
        outcome.result["seconds"] = time.perf_counter() - began
        report.write_result(folder, outcome.result)
    return outcome.result


def _distil_and_compare(
    settings: DemoSettings, clips: ClipSet, vae: TinyVAE, text_encoder: TinyTextEncoder, teacher: nn.Module
) -> report.Outcome:
    with torch.no_grad():
        pixels = frames_to_tensor(clips.frames)
        latents = torch.cat([vae.encode(part) for part in tqdm(pixels.split(8), desc="encoding clips", unit="batch")])
    text_encoder.y_embedder = teacher.y_embedder
    num_frames, height, width = clips.frames.shape[1:4]

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
                "as_described": report.as_described(vae, samples[name], batch.prompts),
            }
        )
    result = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "samplers": rows,
        "windows": _window_errors(scheduler, teacher, student, text_encoder, batch, path),
        "loss": {"first": float(np.mean(history[:10])), "last": float(np.mean(history[-10:]))},
        "network": type(student).__module__.split(".")[0] + "." + type(student).__name__,
        "unknown_captions": report.unknown_captions(clips.captions),
    }
    own_clips = None if settings.videos is None else clips
    return report.Outcome(result, samples, batch.prompts, student, scheduler.state(), history, own_clips)


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
        if (root / "scripts" / "diffusion").is_dir():
            raise ValueError(
                f"the demo's teacher is an STDiT3, whose weights do not fit the MMDiT of Open-Sora 2.0, got {str(root)!r}; "
                "`python benchmarks/few_step.py --world mmdit --open-sora ROOT` trains one of that class, and its students"
            )
        raise ValueError(f"--open-sora must be the root of an Open-Sora v1.2.0 or v1.3 checkout, got {str(root)!r}")
    from opensora_perflow import portable

    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    portable.activate()
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    from opensora_perflow.checkpoints import read_state_dict

    network = STDiT3(STDiT3Config(**TinySTDiT().config)).eval()
    missing, unexpected = network.load_state_dict(read_state_dict(WEIGHTS), strict=False)
    # v1.3 adds embedders of reference frames, zero until they are trained.
    if unexpected or any(not key.startswith("x_embedder_cond") for key in missing):
        raise ValueError(f"the shipped weights do not fit {root}'s STDiT3: missing {missing[:3]}, unknown {unexpected[:3]}")
    return network


def _clips(settings: DemoSettings) -> ClipSet:
    """The user's clips, without what earlier demos wrote below the same folder."""
    clips = read_clips(settings.videos, skip=lambda path: report.is_output(path, settings.videos))
    report.warn_of_unknown(clips.captions)
    return clips


def _own_clips(settings: DemoSettings, folder: Path) -> ClipSet:
    """Clips of moving shapes, written to the folder's `clips` with a table that names them in the output folder."""
    table = write_clips(folder / report.CLIPS, settings.num_clips, seed=settings.seed)
    clips = read_clips(table)
    name_folder(table, settings.out.resolve() / report.CLIPS)
    return clips


def _sampling_batch(
    settings: DemoSettings, captions: list[str], latent_shape: torch.Size, shape: tuple[int, int, int]
) -> Batch:
    generator = torch.Generator().manual_seed(settings.seed + 1)
    noise = torch.randn(settings.num_samples, *latent_shape, generator=generator)
    prompts = shuffled(captions, settings.num_samples, generator)
    return Batch(noise, prompts, sizes(settings.num_samples, *shape))


def _teacher_sampler(steps: int, guidance_scale: float) -> Any:
    """The teacher's own sampler: one window and guidance make `perflow` Open-Sora's rflow (benchmarks/sampler_parity.py)."""
    return build_module(dict(type="perflow", windows=1, num_sampling_steps=steps, cfg_scale=guidance_scale), SCHEDULERS)


@torch.no_grad()
def _teacher_path(
    teacher: nn.Module, text_encoder: Any, batch: Batch, settings: DemoSettings, edges: tuple[float, ...]
) -> TeacherPath:
    start = time.perf_counter()
    velocity = guided_field(teacher, text_encoder, batch.prompts, batch.sizes, settings.guidance_scale)
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
            model_args = {**{key: value[index] for key, value in encoded.items()}, **sizes(len(index), *shape)}
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
def _window_errors(
    scheduler: Any, teacher: nn.Module, student: nn.Module, text_encoder: Any, batch: Batch, path: TeacherPath
) -> list[dict[str, float]]:
    """Error of one step across each window, from the teacher's own state at its noisy edge, and the motion it points at."""
    edges = scheduler.windows.edges
    fields = {
        "teacher": guided_field(teacher, text_encoder, batch.prompts, batch.sizes, scheduler.recipe.guidance.scale),
        "student": guided_field(student, text_encoder, batch.prompts, batch.sizes, 1.0),
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
