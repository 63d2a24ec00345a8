"""A look at a run before its first step: does the teacher know the way between these data and noise, and can the student learn?

A network that was trained by squared error answers the mean of what it should say. Over samples <answer, ideal> is therefore
<answer, answer>, and the slope <answer, ideal> / <answer, answer> is 1, however little of the ideal can be known. A cosine has
no such mark: healthy teachers have .98 on the tiny video model and .65 on the mixture. Two evaluations, and nine more where the
first one is odd, to say what is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opensora_perflow.method.ddpm import DDPM
from opensora_perflow.training.blame import TEXT, TEXT_MASK
from opensora_perflow.training.host import Host
from opensora_perflow.training.players import Batch, Player
from opensora_perflow.training.segments import held

BLANK = 1e-3
"""Standard deviation of latents below which there is nothing to compare with: data-free runs have zeros."""
LEAST_COSINE, LEAST_SIZE = 0.1, 0.05
"""Less of either is an answer that has nothing to do with the data."""
ODD_SLOPE, WRONG_SLOPE = 0.15, 0.35
"""How far a slope may be from 1, beside three standard errors. A cause is looked for beyond the errors alone. A slope within
the first needs a cause that explains much; one beyond the second is warned of without a cause. Healthy: video .98 to 1.01,
mixture .85 to 1.41 with errors of .1. Latents half or twice as large have .70 and 1.5, times in 0..1 .70 to .90."""
BETTER, MUCH_BETTER = 0.05, 0.2
"""What a cause must add to the cosine, beyond and within ODD_SLOPE."""
CONVINCING = 0.3
"""Cosine that a cause must give to be named: one of a dozen tries is a little better by accident, with random weights too."""
TIMESTEPS = 1000
"""Size of the other range of times, where a process tells times in 0..1."""
REFUSED = -0.5
"""No teacher has such a cosine by ignorance: networks of random weights have one near 0. It answers the opposite."""


class Fit(NamedTuple):
    """How an answer fits the ideal. size: The answer's norm beside the ideal's. error: Standard error of the slope."""

    cosine: float
    size: float
    slope: float
    error: float

    @classmethod
    def of(cls, answer: Tensor, ideal: Tensor) -> Fit:
        """Of answers and ideals [B, ...], over all elements."""
        answer, ideal = answer.double().flatten(1), ideal.double().flatten(1)
        power, wanted, both = answer.square().sum(), ideal.square().sum(), (answer * ideal).sum()
        slope = both / power
        rest = answer * (ideal - slope * answer)
        # Elements of a sample hang together, and few samples tell little of their spread: the larger of both.
        error = torch.maximum(rest.square().sum(), rest.sum(dim=1).square().sum()).sqrt() / power
        values = (both / (power * wanted).sqrt(), (power / wanted).sqrt(), slope, error)
        return cls(*(value.nan_to_num(0.0, 0.0, 0.0).item() for value in values))

    def is_within(self, tolerance: float) -> bool:
        """Is the answer about the data, with a slope that is as far from 1 at most?"""
        known = self.cosine > LEAST_COSINE and self.size > LEAST_SIZE
        return known and abs(self.slope - 1) <= tolerance + 3 * self.error


SIGN, TIME, SCALE, HALVES, DATA, DROPOUT, TEXTS = KINDS = (
    "sign of the velocity", "time scale", "latents' scale", "channel halves", "teacher and data", "dropout in the teacher",
    "text",
)  # fmt: skip
"""What may be wrong with a teacher."""


@dataclass(frozen=True)
class Report:
    """What is known of a teacher. problems: One of KINDS -> what is seen, and how to mend it. told: The numbers, in words;
    empty where nothing can be said of the data. refused: It answers the opposite of what it should."""

    text: str
    problems: Mapping[str, str] = field(default_factory=dict)
    told: str = ""
    refused: bool = False

    @property
    def level(self) -> int:
        """Of the line in the log."""
        return logging.WARNING if self.problems else logging.INFO


def check_trainable(model: nn.Module) -> None:
    """Raises ValueError for a student that cannot change. One without any parameters is a field that somebody measures."""
    trainable = [parameter.requires_grad and parameter.numel() > 0 for parameter in model.parameters()]
    if trainable and not any(trainable):
        raise ValueError(
            "the student has 0 trainable parameters, so that no step would change it; take back what froze it "
            "(requires_grad_(False), a freeze option of the model), or attach the adapter before the first step"
        )


def check_teacher(batch: Batch, host: Host, *, guided: bool = False) -> Report:
    """As `examine_teacher`.

    Raises:
        ValueError: the teacher answers the opposite of what it should.
    """
    report = examine_teacher(batch, host, guided=guided)
    if report.refused:
        raise ValueError(report.text)
    return report


@torch.no_grad()
def examine_teacher(batch: Batch, host: Host, *, guided: bool = False) -> Report:
    """Compare the teacher with the data of a run's first batch, and with itself.

    Args:
        batch: The first batch.
        host: Its sequence-parallel groups decide together.
        guided: The teacher is a student with guidance in its weights, whose answers are larger than a mean's.
    """
    unknown = _cannot_tell(batch)
    if unknown:
        return Report(f"PeRFlow cannot compare the teacher with data: {unknown}")
    probe = _Probe.of(batch)
    answer = probe.answer()
    fit, odd = probe.fit(answer), probe.oddities(answer)
    (fit,) = host.shared(fit)
    told = (
        f"at t = {probe.time:.2g} what it says and what it should say have the cosine {fit.cosine:.2f} and the slope "
        f"{fit.slope:.2f} ± {fit.error:.1g}, and it is {fit.size:.2f} times as large"
    )
    sound = fit.is_within(0.0) or (guided and fit.cosine > LEAST_COSINE)
    kind, cause = ("", "") if sound else probe.cause(fit, answer)
    if fit.cosine < REFUSED:
        text = f"the teacher answers the opposite of what it should on these data: {told}. Most likely {cause}"
        return Report(text, {kind: f"most likely {cause}", **odd}, told, refused=True)
    if cause:
        odd = {kind: f"a healthy teacher has a slope of 1, whatever its cosine. Most likely {cause}", **odd}
    if odd:
        return Report(f"PeRFlow's teacher does not look right: {told}. Seen: {'; '.join(odd.values())}", odd, told)
    return Report(f"PeRFlow's teacher fits the data: {told}", told=told)


def _cannot_tell(batch: Batch) -> str:
    """Why nothing can be said; empty where something can."""
    finite = all(bool(torch.isfinite(value).all()) for value in (batch.data, batch.noise))
    if not finite:
        return "the latents or the noise are not finite"
    return "" if batch.data.std() > BLANK else "the latents are blank, as those of a run without videos"


def _apart(x: Tensor) -> Tensor:
    """Distances of all pairs of rows of x [B, ...]: [B, B], 0 for equal ones."""
    rows = x.flatten(1).double()
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class _Probe:
    """The teacher, unguided, at one point of each sample's way."""

    batch: Batch
    teacher: Player
    time: float

    @classmethod
    def of(cls, batch: Batch) -> _Probe:
        teacher = batch.players.teacher(1.0)
        return cls(batch, teacher, teacher.process.probe_time)

    @property
    def t(self) -> Tensor:
        return torch.full_like(self.batch.drawn.t_start, self.time)

    def point(self, factor: float = 1.0) -> Tensor:
        return held(self.batch, self.teacher.process.add_noise(factor * self.batch.data, self.batch.noise, self.t))

    def answer(self, factor: float = 1.0, told: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        told = self.teacher.process.to_timestep(self.t) if told is None else told
        return self._moving(self.teacher.output(self.point(factor) if x is None else x, told))

    def fit(self, answer: Tensor, factor: float = 1.0) -> Fit:
        return Fit.of(answer, self._moving(self.teacher.process.ideal(factor * self.batch.data, self.batch.noise)))

    def oddities(self, answer: Tensor) -> dict[str, str]:
        """What shows in one more evaluation, of the first sample's state under the text of every sample."""
        x = self.point()
        again = self.answer(x=x[:1].expand_as(x))
        size = answer[0].norm().clamp(min=1e-12)
        moved = ((again[0] - answer[0]).norm() / size).item()
        odd = {}
        if moved > 0.01:
            odd[DROPOUT] = (
                f"two calls with the same input differ by {moved:.0%}: dropout, or another layer that draws, is on; put the "
                "network into eval mode or set its dropout to 0"
            )
        inputs = self.batch.inputs()
        text, mask = (inputs.get(name) for name in (TEXT, TEXT_MASK))
        if isinstance(text, Tensor) and len(text) == len(x) and size > 1e-6:
            different = _apart(text) > 0
            same = _apart(again).to(different.device) < 1e-3 * size.item()
            # Tokenizers end every text with a token of its own, so that no text but the empty one is one token.
            if different.any() and isinstance(mask, Tensor) and mask.shape[-1] > 1 and mask.count_nonzero(dim=-1).max() <= 1:
                odd[TEXTS] = f"the text's mask shows one token of {mask.shape[-1]} at most: check what the text encoder gives"
            elif different.any() and same[different].float().mean() >= 0.5:  # texts that were dropped have their own answer
                odd[TEXTS] = (
                    "different texts get the same answer: the text's mask may show too few of its tokens, or the text encoder "
                    "is not the one that the teacher was trained with"
                )
        return odd

    def cause(self, fit: Fit, answer: Tensor) -> tuple[str, str]:
        """The most likely cause, as one of KINDS and in words: what makes the teacher healthy again, if anything does. Empty:
        nothing does, and the answer is not so far off."""
        opposite = self.fit(-answer)
        if opposite.is_within(ODD_SLOPE) and opposite.cosine > -REFUSED:
            flipped = SIGN, "its sign is flipped", opposite
            # On data that vary little an answer of the wrong time may be the opposite, too. Epsilon networks may have a table
            # of timesteps, and are not asked out of its range.
            times = () if isinstance(self.teacher.process, DDPM) else self._times()
            tries = [flipped, *(tried for tried in times if tried[2].is_within(ODD_SLOPE))]
            kind, words, best = max(tries, key=lambda tried: tried[2].cosine)
            return kind, f"{words} (the cosine is {best.cosine:.2f} then)"
        better = MUCH_BETTER if fit.is_within(ODD_SLOPE) else BETTER
        least = max(fit.cosine + better, CONVINCING)
        tries = [tried for tried in self._tries() if tried[2].is_within(ODD_SLOPE) and tried[2].cosine > least]
        if tries:
            # By the slope: data that are too small raise the cosine of an answer that is noise, as they hide less of the noise.
            kind, words, best = min(tries, key=lambda tried: abs(tried[2].slope - 1))
            return kind, f"{words} (the cosine is {best.cosine:.2f} then)"
        if fit.is_within(WRONG_SLOPE):
            return "", ""
        if fit.size <= LEAST_SIZE:
            return HALVES, (
                "the wrong half of the network's output is taken, or the weights were not trained: the answer is nearly zero"
            )
        if abs(fit.cosine) <= LEAST_COSINE:
            return HALVES, (
                "the wrong half of the network's output is taken, or the weights were not trained or not loaded: the answer "
                "has nothing to do with the data"
            )
        return DATA, (
            "the latents, the text or the times are not those that the teacher was trained with (VAE and its scale, text "
            "encoder and mask, scheduler), or it is of another kind (path, sign)"
        )

    def _times(self) -> Iterator[tuple[str, str, Fit]]:
        process = self.teacher.process
        told = process.to_timestep(self.t)
        count = process.num_timesteps if process.num_timesteps > 1 else TIMESTEPS
        times = {
            f"it is told times in 0..1 and knows 0..{count}": told * count,
            f"it is told times in 0..{count} and knows 0..1": told / count,
            "its time runs the other way (1 is data)": process.to_timestep(1.0 - self.t),
        }
        for words, told in times.items():
            yield TIME, words, self.fit(self.answer(told=told))

    def _tries(self) -> Iterator[tuple[str, str, Fit]]:
        yield from self._times()
        for factor in (10.0, 5.0, 2.0, 0.5, 0.2, 0.1):
            words = f"the latents are {max(factor, 1 / factor):g} times too {'small' if factor > 1 else 'large'}"
            yield SCALE, f"{words} (the VAE's scale)", self.fit(self.answer(factor), factor)

    def _moving(self, x: Tensor) -> Tensor:
        """Without the frames that stand still."""
        moving = self.teacher.moving
        return x if moving is None else x * moving[:, None, :, None, None]
