"""What can be seen of a run in its first batch, with the networks at hand: the checks of `opensora-perflow doctor`.

A check is a function of a case that gives findings. To add one, write it and name it in CHECKS. Networks are called as training
calls them, through the batch's players, so that the checks hold for every host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opensora_perflow.conventions import shift_time
from opensora_perflow.method.ddpm import DDPM
from opensora_perflow.method.solvers import euler_step
from opensora_perflow.training.adapters import adapters
from opensora_perflow.training.blame import TEXT, TEXT_MASK, NotFinite
from opensora_perflow.training.findings import Finding
from opensora_perflow.training.first_step import DROPOUT, KINDS, TEXTS, examine_teacher
from opensora_perflow.training.guard import BLANK, SHARE_BLANK, STILL
from opensora_perflow.training.monitor import HeldOutBatch, Monitor
from opensora_perflow.training.players import Batch
from opensora_perflow.training.run import TrainingRun
from opensora_perflow.training.segments import held
from opensora_perflow.training.teacher import fingerprint
from opensora_perflow.training.vitals import data_variation

PARITY = 0.02
"""Relative difference that two ways to the same number may have: bfloat16 has steps of 1/256."""
ROUNDINGS = 8
"""Of a network's precision, that a guided answer may be off by: guidance multiplies the difference of two answers."""
LARGEST_SLOPE = 20.0
"""Of a window's line, in root mean squares of data and noise."""


@dataclass(frozen=True)
class Case:
    """A run at its first step, that step's batch, and the student."""

    run: TrainingRun
    batch: Batch
    model: nn.Module

    @property
    def fine_times(self) -> Tensor:
        """The teacher's steps through all windows, [K S + 1, B], flow times."""
        grids = self.run.solver_grids
        grid = torch.cat([grids[:, :-1].flatten(), grids[-1, -1:]]).to(self.batch.data.device)
        return shift_time(grid[:, None].expand(-1, len(self.batch.data)), self.batch.windows.ratio)


Check = Callable[[Case], Iterator[Finding]]


def teacher_and_data(case: Case) -> Iterator[Finding]:
    """Sign, scale, times, output half, dropout and text of the teacher, see first_step.py."""
    run = case.run
    guided = run.teacher.is_student or run.recipe.teacher.allow_distilled
    report = examine_teacher(case.batch, run.host, guided=guided)
    if run.teacher.network.training and not adapters(run.teacher.network):
        problems = {DROPOUT: "the teacher is in train mode: nothing may call train() on its network", **report.problems}
    else:
        problems = report.problems
    for kind in KINDS:
        known = bool(report.told) or kind in problems
        measured = report.told if kind not in (DROPOUT, TEXTS) else "one more call with the first sample's state"
        expected = "a slope of 1" if kind not in (DROPOUT, TEXTS) else "the same answer, and another for another text"
        yield Finding(kind, kind not in problems if known else None, measured or report.text, expected, problems.get(kind, ""))


def window_lookup(case: Case) -> Iterator[Finding]:
    """Edges and their neighbours in float64 are found in their windows."""
    windows, draws = case.batch.windows, case.run.recipe.draws
    edges, count = windows.edges, windows.windows.num_windows
    wrong = []
    for k in range(count):
        own = windows.lookup(edges[k])
        below = windows.lookup(torch.nextafter(edges[k + 1], torch.ones_like(edges[k])))
        if not bool((own == k).all() & (below == k).all()) or not bool((edges[k] > edges[k + 1]).all()):
            wrong.append(k)
    drawn = case.batch.drawn
    exact = draws.overlap == 0 and not draws.grids
    outside = ((drawn.times > drawn.t_start) | (drawn.times < drawn.t_end)).any(dim=0) if exact else torch.zeros(1)
    yield Finding(
        "window lookup",
        not wrong and not bool(outside.any()),
        f"{count - len(wrong)} of {count} windows hold their edges; {int(outside.sum())} drawn times outside their window",
        "all, and 0",
        "windows are looked up in rounded times, or edges are swapped: look up in float64 before any cast, and let edges "
        "descend",
    )


def precision_of_t(case: Case) -> Iterator[Finding]:
    """Times keep float64 until a network is called."""
    drawn = case.batch.drawn
    found = {str(value.dtype).removeprefix("torch.") for value in (drawn.times, drawn.solver_times, case.batch.windows.edges)}
    yield Finding(
        "precision of t", found == {"float64"}, ", ".join(sorted(found)), "float64",
        "bfloat16 rounds .749 to .75, which is another window: keep times in float64 until the network is called",
    )  # fmt: skip


def null_text(case: Case) -> Iterator[Finding]:
    """The empty text has an answer of its own."""
    answers = _branches(case)
    if isinstance(answers, str):
        yield Finding("null text", None, answers)
        return
    text, null = answers
    moved = _relative(text, null)
    yield Finding(
        "null text", moved > 1e-4, f"answers with and without text differ by {moved:.2%}", "more than 0.01%",
        "the teacher is told the empty text for every sample, or the null text is the text: check the text encoder, "
        "class_dropout_prob and y_embedder.y_embedding",
    )  # fmt: skip


def cfg_parity(case: Case) -> Iterator[Finding]:
    """One guided call is what two calls give."""
    answers = _branches(case)
    scale = 3.0
    if isinstance(answers, str) or isinstance(case.batch.players.process, DDPM) or case.run.teacher.is_student:
        why = answers if isinstance(answers, str) else "this teacher's guidance has rules of its own"
        yield Finding("CFG parity", None, why)
        return
    text, null = answers
    together, apart = (x.flatten(1) for x in (_answer(case, scale), null + scale * (text - null)))
    # Up to a factor a sample, which use_flaw_fix puts on the guided answer.
    factor = (together * apart).sum(dim=1, keepdim=True) / apart.square().sum(dim=1, keepdim=True).clamp(min=1e-12)
    difference, most = _relative(together, factor * apart), max(ROUNDINGS * _rounding(case), 1e-3)
    yield Finding(
        "CFG parity", difference < most, f"a doubled batch and two calls differ by {difference:.2%}", f"less than {most:.1%}",
        "rows of the doubled batch get another's text, mask or size: masks must be tiled (a b a b), not repeated (a a b b)",
    )  # fmt: skip


def text_mask(case: Case) -> Iterator[Finding]:
    """A mask of 0 and 1, one row a sample, that shows some of each text."""
    inputs = case.batch.inputs()
    mask, text = inputs.get(TEXT_MASK), inputs.get(TEXT)
    if not isinstance(mask, Tensor) or not isinstance(text, Tensor):
        yield Finding("text mask", None, "this network is told no text mask")
        return
    shown = mask.flatten(1).count_nonzero(dim=1)
    right = len(mask) == len(text) and mask.shape[-1] == text.shape[-2] and bool(((mask == 0) | (mask == 1)).all())
    yield Finding(
        "text mask",
        right and bool((shown > 0).all()),
        f"{list(mask.shape)} for text {list(text.shape)}, {int(shown.min())} to {int(shown.max())} tokens shown",
        "one row of 0 and 1 a sample, as long as the text, with at least one token",
        "the mask must be the tokenizer's attention_mask of the same texts",
    )


def x_mask(case: Case) -> Iterator[Finding]:
    """Frames that stand still keep their values in a teacher's solution."""
    batch = case.batch
    moving = batch.players.moving
    if moving is None:
        yield Finding("x_mask", None, "all frames move in this batch")
        return
    start = held(batch, batch.noise)
    states = batch.players.teacher(1.0).trajectory(start, case.fine_times[:2], "euler", case.run.teacher.source)
    still = ~moving[:, None, :, None, None].to(start.device)
    drift = ((states[-1] - start).abs() * still).max().item()
    none = int((~moving).all(dim=1).sum())
    yield Finding(
        "x_mask", drift == 0 and none == 0, f"still frames drift by {drift:.2g}; {none} samples without a moving frame", "0 "
        "and 0",
        "lower mask_ratios so that every clip keeps a moving frame",
    )  # fmt: skip


def step_0_parity(case: Case) -> Iterator[Finding]:
    """A student that was not trained, on the teacher's steps, ends where the teacher does."""
    run, batch = case.run, case.batch
    if fingerprint(run.host.settled(case.model)) != run.teacher.fingerprint or run.recipe.guidance.mode == "range":
        yield Finding("step-0 parity", None, "the student is not its teacher's copy: it was trained, or is told a scale")
        return
    times = case.fine_times
    bounds = HeldOutBatch.bounds(times)
    student = batch.players.student.velocity(bounds)
    start = x = held(batch, batch.noise)
    for t, t_next in zip(times, times[1:]):
        x = euler_step(student, x, t, t_next)
    end = batch.players.teacher(1.0).trajectory(start, times, "euler", run.teacher.source)[-1]
    difference = _relative(x, end)
    yield Finding(
        "step-0 parity", difference < PARITY, f"ends of {len(times) - 1} steps differ by {difference:.2%}", f"less than "
        f"{PARITY:.0%}",
        "student and teacher are told different texts, masks, sizes or times, or something draws in the student",
    )  # fmt: skip


def targets(case: Case) -> Iterator[Finding]:
    """Every window has a line to learn, of a size that data and noise can have."""
    if case.run.store is not None and case.run.store.over_data:
        yield Finding("targets", None, "windows of a store over data start at data: there is no path from noise to look at")
        return
    monitor = Monitor(None)
    monitor.keep(case.batch, case.run.recipe.guidance, lambda: case.run.segments)
    remedy = "use dtype bf16 instead of fp16, and check the teacher's weights, guidance.scale and the latents' scale"
    try:
        slopes = monitor.batches[0].slopes(case.run.solver_grids)
    except NotFinite as error:
        yield Finding("targets", False, str(error), "finite", remedy)
        return
    size = max(case.batch.data.float().square().mean().item() + 1.0, 1e-6) ** 0.5
    bounded = all(math.isfinite(slope) and 0 < slope < LARGEST_SLOPE * size for slope in slopes)
    yield Finding(
        "targets", bounded, "slopes of the windows " + ", ".join(f"{slope:.3g}" for slope in slopes),
        f"finite, from 0 to {LARGEST_SLOPE * size:.3g}", remedy,
    )  # fmt: skip


def own_weights(case: Case) -> Iterator[Finding]:
    """The teacher shares no weight that is trained."""
    network = case.run.teacher.network
    teachers = {id(parameter) for parameter in network.parameters()}
    trained = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    shared = 0 if adapters(network) else sum(id(parameter) in teachers for parameter in trained)
    yield Finding(
        "student as teacher", shared == 0, f"{shared} of {len(trained)} trained weights are the teacher's too", "0",
        "the student would teach itself: name the original model in teacher=dict(from_pretrained=...)",
    )  # fmt: skip


def latents(case: Case) -> Iterator[Finding]:
    """Clips vary, and move."""
    deviation, motion = (value.tolist() for value in data_variation(case.batch.data))
    blank = sum(value <= BLANK * max(deviation) for value in deviation)
    if blank == len(deviation):
        yield Finding("latents", None, "all are blank, as those of a run without videos")
        return
    still = sum(value < STILL for value in motion)
    yield Finding(
        "latents",
        blank < max(SHARE_BLANK * len(deviation), 1) and 2 * still < len(motion),
        f"{blank} of {len(deviation)} blank, {still} without motion",
        f"less than {SHARE_BLANK:.0%} blank, less than half without motion",
        "look at the videos, the CSV's paths, frame_interval and the VAE",
    )


CHECKS: tuple[Check, ...] = (
    teacher_and_data,
    window_lookup,
    precision_of_t,
    null_text,
    text_mask,
    x_mask,
    cfg_parity,
    step_0_parity,
    targets,
    own_weights,
    latents,
)


@torch.no_grad()
def examine(case: Case) -> list[Finding]:
    """All findings of a case; a check that a network refuses is a finding too."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(case)
        except (ValueError, RuntimeError) as error:
            findings.append(Finding(check.__name__.replace("_", " "), False, str(error), "an answer"))
    return findings


def aliveness(run: TrainingRun) -> Iterator[Finding]:
    """After a few steps: do the student's weights and its EMA move?"""
    seen, rate = run.observer.seen, run.observer.rate
    gradients = [one.grad_norm for one in seen if one.grad_norm > 0]
    update = max((one.update for one in seen if one.update > 0), default=0.0)
    alive = bool(gradients) and (rate is None or rate > 0)
    yield Finding(
        "trained weights", alive if update or not alive else None,
        f"gradient norm {max(gradients, default=0.0):.3g}, update {update:.2g} of their length, learning rate {rate}",
        "more than 0", "check lr, the warm-up, requires_grad and what the optimizer was given",
    )  # fmt: skip
    moves = [one.ema_update for one in seen[1:] if not math.isnan(one.ema_update)]
    if not moves or not update:
        yield Finding("EMA", None, "there is none, or the student has not moved yet")
    else:
        yield Finding(
            "EMA", max(moves) > 0, f"moves by {max(moves):.2g} of its length a step", "more than 0",
            "check ema_decay: 1.0 never moves, and 0.9999 never moves in bfloat16; do not sample ema.pt",
        )  # fmt: skip
    if torch.cuda.is_available():
        peak, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        most = f"less than 95% of {total / 2**30:.0f} GiB"
        yield Finding("memory", peak < 0.95 * total, f"{peak / 2**30:.1f} GiB at the peak", most)


def _answer(case: Case, scale: float) -> Tensor:
    """What the guided teacher says at a point of the batch's ways, [B, ...]."""
    batch = case.batch
    teacher = batch.players.teacher(scale)
    t = torch.full_like(batch.drawn.t_start, teacher.process.probe_time)
    x = held(batch, teacher.process.add_noise(batch.data, batch.noise, t))
    return teacher.output(x, teacher.process.to_timestep(t))


def _branches(case: Case) -> tuple[Tensor, Tensor] | str:
    """The teacher's answers with and without text; or why there are none."""
    try:
        return _answer(case, 1.0), _answer(case, 0.0)
    except ValueError as error:
        return str(error)


def _rounding(case: Case) -> float:
    weights = next(case.run.teacher.network.parameters(), torch.zeros(()))
    return torch.finfo(weights.dtype).eps


def _relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm().clamp(min=1e-12)).item()
