"""The demo: distil a tiny video teacher into a 4-step student, sample both from the same noise, and show the difference.

Clips, network, VAE and text encoder are small. The scheduler is the PeRFlow object that Open-Sora builds, called the way its
train.py and inference.py call it.
"""

import logging
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from opensora_perflow.checks import check_keys, key, number, whole
from opensora_perflow.hosts.v1.host import OpenSora
from opensora_perflow.method.metrics import endpoint_error, energy_distance, temporal_difference_energy
from opensora_perflow.registry import SCHEDULERS, build_module
from opensora_perflow.tools import compare, outputs, report
from opensora_perflow.tools.probes import LATENT_SHAPE, guided_field, shuffled, sizes
from opensora_perflow.tools.threads import few_threads
from opensora_perflow.training.ema import Ema, decay_of
from opensora_perflow.worlds.clips import ClipSet, contents, frames_to_tensor, name_folder, read_clips, write_clips
from opensora_perflow.worlds.codec import TinyVAE
from opensora_perflow.worlds.model import WEIGHTS, TinySTDiT, load_teacher
from opensora_perflow.worlds.text import TinyTextEncoder

logger = logging.getLogger("opensora_perflow")

STAGES = ("clips", "the teacher's fine path", "training the student", "sampling", "pictures and numbers")
STUDENT = "student, 4 steps"
QUICK = {"iterations": 24, "num_clips": 16, "num_samples": 8}
"""What `--quick` changes."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; every field is an option of `opensora-perflow demo`."""

    videos: Path | None = None
    """Folder of videos (or a CSV with path and text); None writes clips of moving shapes."""
    out: Path = Path("perflow_demo")
    """Folder for everything that is written."""
    open_sora: Path | None = None
    """Root of an Open-Sora v1.2.0 or v1.3 checkout, whose STDiT3 class then takes the place of the small copy of it."""
    iterations: int = key(100, whole())
    """Training steps, >= 1."""
    batch_size: int = key(16, whole())
    """Clips per training step, >= 1."""
    lr: float = key(3e-4, number(low=0))
    """Learning rate after a short warm-up, > 0."""
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


def run(settings: DemoSettings) -> dict[str, Any]:
    """Run the demo and return what it wrote to results.json.

    The output folder is not touched before everything is there: then all of it takes its place at once.

    Raises:
        ValueError: invalid settings, no readable video, an Open-Sora checkout without STDiT3, or an output folder where the
            demo's names are other files.
    """
    began, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(settings.seed)
    _say(1)
    vae, text_encoder, teacher = TinyVAE().eval(), TinyTextEncoder(), build_network(settings.open_sora)
    clips = None if settings.videos is None else _clips(settings)
    with outputs.together(settings.out, report.KIND) as folder, few_threads(lambda: _evaluate(teacher, text_encoder)):
        if clips is None:
            clips = _own_clips(settings, folder)
        outcome = _distil_and_compare(settings, clips, vae, text_encoder, teacher, folder)
        _say(5)
        report.write(folder, outcome, vae)
        logger.info("the page")
        outcome.result.update({"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu})
        report.write_result(folder, outcome.result)
    return outcome.result


class _Host(OpenSora):
    """No script of Open-Sora: the run writes its record into the demo's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder(self) -> Path:
        return self._folder


@torch.no_grad()
def _evaluate(network: nn.Module, text_encoder: TinyTextEncoder) -> None:
    """One guided evaluation of eight samples."""
    text_encoder.y_embedder = network.y_embedder
    velocity = guided_field(network, text_encoder, [contents()[0].caption] * 8, sizes(8), 3.0)
    velocity(torch.zeros(8, *LATENT_SHAPE), torch.ones(8, dtype=torch.float64))


def _say(stage: int) -> None:
    logger.info("stage %d of %d: %s", stage, len(STAGES), STAGES[stage - 1])


def _distil_and_compare(
    settings: DemoSettings, clips: ClipSet, vae: TinyVAE, text_encoder: TinyTextEncoder, teacher: nn.Module, folder: Path
) -> report.Outcome:
    with torch.no_grad():
        pixels = frames_to_tensor(clips.frames)
        latents = torch.cat([vae.encode(part) for part in tqdm(pixels.split(8), desc="encoding clips", unit="batch")])
    text_encoder.y_embedder = teacher.y_embedder
    num_frames, height, width = clips.frames.shape[1:4]

    scheduler = build_module(
        dict(
            type="perflow",
            windows=compare.WINDOWS,
            guidance=dict(mode="fixed", scale=settings.guidance_scale),
            draws=dict(seed=settings.seed),
        ),
        SCHEDULERS,
    )
    scheduler.host = _Host(folder)
    student = build_network(settings.open_sora)
    batch = _sampling_batch(settings, clips.captions, latents.shape[1:], (num_frames, height, width))
    _say(2)
    path = compare.teacher_path(teacher, text_encoder, batch, settings.guidance_scale, progress=True)
    report.write_frames(folder, {"teacher": path.end}, batch.prompts, vae)
    logger.info("first picture, what the teacher draws: %s", folder / "frames.png")
    _say(3)
    history, averaged = _train(scheduler, student, text_encoder, latents, clips, settings, (num_frames, height, width))
    _say(4)
    own = {steps: compare.teacher_sampler(steps, settings.guidance_scale) for steps in (30, 4)}
    samplers = {
        "teacher, 30 steps": (own[30], teacher),
        "teacher, 4 steps": (own[4], teacher),
        STUDENT: (scheduler, averaged),
        report.RAW: (scheduler, student),
    }
    sampled = {name: compare.sample(*pair, text_encoder, batch, progress=pair[0] is own[30]) for name, pair in samplers.items()}
    steps = len(path.fine.times) - 1
    reference = compare.Sampled(path.end, path.fine.states[:-1], 4 * steps, path.seconds)
    sampled = {f"teacher, {steps} midpoint steps": reference, **sampled}
    fields = [
        guided_field(network, text_encoder, batch.prompts, batch.sizes, scale)
        for network, scale in ((teacher, settings.guidance_scale), (averaged, 1.0))
    ]
    edges = scheduler.windows.edges
    result = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "samplers": [_row(name, one, path.end, batch.prompts, vae) for name, one in sampled.items()],
        "windows": compare.window_errors(edges, *fields, path.at(edges)),
        "paths": compare.drawn_paths(path, sampled[STUDENT], batch.prompts),
        "loss": {"first": float(np.mean(history[:10])), "last": float(np.mean(history[-10:]))},
        "network": type(student).__module__.split(".")[0] + "." + type(student).__name__,
        "unknown_captions": report.unknown_captions(clips.captions),
    }
    samples = {name: one.latents for name, one in sampled.items()}
    own_clips = None if settings.videos is None else clips
    return report.Outcome(result, samples, batch.prompts, averaged, scheduler.state(), history, own_clips)


def _row(name: str, sampled: compare.Sampled, reference: Tensor, prompts: list[str], vae: TinyVAE) -> dict[str, Any]:
    """A sampler's row of the table."""
    x = sampled.latents
    return {
        "sampler": name,
        "nfe": sampled.nfe,
        "seconds_per_sample": sampled.seconds / len(x),
        "endpoint_error": endpoint_error(x, reference),
        "energy_distance": energy_distance(x, reference),
        "motion_energy": temporal_difference_energy(x),
        "as_described": report.as_described(vae, x, prompts),
    }


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
) -> compare.Batch:
    generator = torch.Generator().manual_seed(settings.seed + 1)
    noise = torch.randn(settings.num_samples, *latent_shape, generator=generator)
    prompts = shuffled(captions, settings.num_samples, generator)
    return compare.Batch(noise, prompts, sizes(settings.num_samples, *shape))


def _train(
    scheduler: Any,
    student: nn.Module,
    text_encoder: Any,
    latents: Tensor,
    clips: ClipSet,
    settings: DemoSettings,
    shape: tuple[int, int, int],
) -> tuple[list[float], nn.Module]:
    """Distil; returns the loss of each step, and a network with the average of the weights, which is the student.

    The calls are those of Open-Sora's train.py, and like there the learning rate stays what it is after the warm-up.
    """
    student.train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    warmup = min(20, settings.iterations)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warmup, 1.0))
    ema = Ema(dict(student.named_parameters()), decay_of(settings.iterations))
    encoded = text_encoder.encode(clips.captions)
    generator = torch.Generator().manual_seed(settings.seed + 2)
    history: list[float] = []
    with tqdm(total=settings.iterations, desc="training", unit="step") as bar:
        for _ in range(settings.iterations):
            index = torch.randint(len(latents), (settings.batch_size,), generator=generator)
            model_args = {**{key: value[index] for key, value in encoded.items()}, **sizes(len(index), *shape)}
            loss = scheduler.training_losses(student, latents[index], model_args)["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rate.step()
            ema.update(dict(student.named_parameters()))
            history.append(loss.item())
            bar.set_postfix(loss=f"{np.mean(history[-20:]):.4f}")
            bar.update()
    averaged = deepcopy(student.eval())
    averaged.load_state_dict(ema.averages, strict=False)  # buffers are not averaged
    return history, averaged
