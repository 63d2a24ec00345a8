"""The demo: distil a tiny video teacher into a 4-step student, sample both from the same noise, and show the difference.

Clips, network, VAE and text encoder are small. What trains and samples are the PeRFlow objects that Open-Sora builds, called
the way its train.py and inference.py call them, see demo_models.py.
"""

import logging
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from opensora_perflow.method.metrics import endpoint_error, energy_distance, temporal_difference_energy
from opensora_perflow.tools import compare, outputs, report
from opensora_perflow.tools.demo_models import DemoModel, build_model
from opensora_perflow.tools.demo_settings import DemoSettings
from opensora_perflow.tools.probes import LATENT_SHAPE, shuffled, sizes
from opensora_perflow.tools.threads import few_threads
from opensora_perflow.training.ema import Ema, decay_of
from opensora_perflow.worlds.clips import ClipSet, contents, frames_to_tensor, name_folder, read_clips, write_clips
from opensora_perflow.worlds.codec import TinyVAE

logger = logging.getLogger("opensora_perflow")

TEACHER = "training a teacher"
STAGES = ("clips", TEACHER, "the teacher's fine path", "training the student", "sampling", "pictures and numbers")
STUDENT = "student, 4 steps"


def run(settings: DemoSettings) -> dict[str, Any]:
    """Run the demo and return what it wrote to results.json.

    The output folder is not touched before everything is there: then all of it takes its place at once. A teacher that was
    trained for Open-Sora 2.0 is there as soon as it is whole.

    Raises:
        ValueError: invalid settings, no readable video, a checkout without a network that the demo knows, or an output folder
            where the demo's names are other files.
    """
    began, cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(settings.seed)
    vae, model = TinyVAE().eval(), build_model(settings.open_sora, settings.guidance_scale, settings.seed)
    trains = model.needs_teacher(settings.out, settings.teacher_iterations)
    say = _Stages([name for name in STAGES if trains or name != TEACHER])
    say.next()
    clips = None if settings.videos is None else _clips(settings)
    with outputs.together(settings.out, report.KIND) as folder, few_threads(lambda: _evaluate(model)):
        if clips is None:
            clips = _own_clips(settings, folder)
        if trains:
            say.next()
        model.make_teacher(settings.out, settings.teacher_iterations)
        outcome = _distil_and_compare(settings, clips, vae, model, folder, say)
        say.next()
        report.write(folder, outcome, vae)
        logger.info("the page")
        outcome.result.update({"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu})
        report.write_result(folder, outcome.result)
    return outcome.result


@torch.no_grad()
def _evaluate(model: DemoModel) -> None:
    """One guided evaluation of eight samples."""
    probe = model.probe(model.teacher, torch.zeros(8, *LATENT_SHAPE), [contents()[0].caption] * 8, 3.0)
    probe.velocity(probe.noise, torch.ones(8, dtype=torch.float64))


class _Stages:
    """Says which stage begins."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._begun = names, 0

    def next(self) -> None:
        self._begun += 1
        logger.info("stage %d of %d: %s", self._begun, len(self._names), self._names[self._begun - 1])


def _distil_and_compare(
    settings: DemoSettings, clips: ClipSet, vae: TinyVAE, model: DemoModel, folder: Path, say: _Stages
) -> report.Outcome:
    with torch.no_grad():
        pixels = frames_to_tensor(clips.frames)
        latents = torch.cat([vae.encode(part) for part in tqdm(pixels.split(8), desc="encoding clips", unit="batch")])
    teacher, student = model.teacher, model.student()
    model.record_in(folder)
    batch = _sampling_batch(settings, clips.captions, latents.shape[1:])
    noise, prompts, edges = batch.noise, batch.prompts, model.windows
    say.next()
    path = compare.follow_reference(model.probe(teacher, noise, prompts, settings.guidance_scale), edges, progress=True)
    report.write_frames(folder, {"teacher": path.end}, prompts, vae)
    logger.info("first picture, what the teacher draws: %s", folder / "frames.png")
    say.next()
    history, averaged = _train(model, student, latents, clips.captions, settings)
    say.next()
    steps = len(path.fine.times) - 1
    reference = compare.Sampled(path.end, path.fine.states[:-1], 4 * steps, path.seconds)
    sampled = {
        f"teacher, {steps} midpoint steps": reference,
        "teacher, 30 steps": model.sample(teacher, batch, 30),
        "teacher, 4 steps": model.sample(teacher, batch, 4),
        STUDENT: model.sample(averaged, batch, 4),
        report.RAW: model.sample(student, batch, 4),
    }
    probes = model.probe(teacher, noise, prompts, settings.guidance_scale), model.probe(averaged, noise, prompts, 1.0)
    result = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()},
        "samplers": [_row(name, one, path.end, prompts, vae) for name, one in sampled.items()],
        "windows": compare.window_errors(edges, *(probe.velocity for probe in probes), path.at(edges), probes[0].ratio),
        "paths": compare.drawn_paths(path, sampled[STUDENT], prompts),
        "loss": {"first": float(np.mean(history[:10])), "last": float(np.mean(history[-10:]))},
        "network": type(student).__module__.split(".")[0] + "." + type(student).__name__,
        "unknown_captions": report.unknown_captions(clips.captions),
    }
    samples = {name: one.latents for name, one in sampled.items()}
    own_clips = None if settings.videos is None else clips
    return report.Outcome(result, samples, prompts, averaged, model.state(), history, own_clips)


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


def _sampling_batch(settings: DemoSettings, captions: list[str], latent_shape: torch.Size) -> compare.Batch:
    generator = torch.Generator().manual_seed(settings.seed + 1)
    noise = torch.randn(settings.num_samples, *latent_shape, generator=generator)
    return compare.Batch(noise, shuffled(captions, settings.num_samples, generator), sizes(settings.num_samples))


def _train(
    model: DemoModel, student: nn.Module, latents: Tensor, captions: list[str], settings: DemoSettings
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
    generator = torch.Generator().manual_seed(settings.seed + 2)
    history: list[float] = []
    with tqdm(total=settings.iterations, desc="training", unit="step") as bar:
        for _ in range(settings.iterations):
            index = torch.randint(len(latents), (settings.batch_size,), generator=generator)
            loss = model.loss(student, latents[index], [captions[i] for i in index.tolist()])
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
