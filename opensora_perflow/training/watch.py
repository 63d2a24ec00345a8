"""What is to be said of a run's held-out errors, and of how sure they are: is training still helping?"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from opensora_perflow.checks import check_keys, key, number, whole
from opensora_perflow.training.removed import kept

POLICIES = ("warn", "rollback", "stop")

ENOUGH = 16
"""Samples that a measurement needs before it may warn: 4 of 5 healthy runs with 4 of them were told that they got worse."""
EARLY = 10
"""Training steps before a first line, so that a short run has one."""
TIE = 0.02
"""Share by which an error may exceed an untrained network's without a word: the first steps of a warm-up change nothing yet."""
SURE = 3.0
"""Standard errors beyond which a difference is no accident of the samples."""


@dataclass(frozen=True)
class WatchSettings:
    """When a run measures itself, and what it warns of."""

    every: int = key(200, whole())
    """Training steps between two measurements, >= 1. The first ones come after a quarter and a half of that: a learning rate
    that is too high shows early. Not earlier: a good one may lose a little at first. One costs an evaluation of the student for
    each window; the first also the teacher's path through all windows."""
    tolerance: float = key(0.25, number(low=0))
    """Share by which the error may rise above its least before a warning, >= 0."""
    policy: str = key("warn", kept(*POLICIES))
    """What is done where training goes wrong, see guard.py and remedies.py. warn: the log says so. rollback: weights,
    optimizer and EMA as they were 25 to 50 steps before, with half of their learning rate; two copies are kept in the CPU's
    memory. stop: the script ends with the message."""

    def __post_init__(self) -> None:
        check_keys(self, "watch.")


@dataclass(frozen=True)
class Estimate:
    """A mean over samples and its standard error."""

    mean: float
    error: float = 0.0

    @classmethod
    def of(cls, values: Tensor, over_ranks: Callable[[float], float], count: float) -> Estimate:
        """Of one value a sample [n]; `over_ranks` averages over processes, `count` is the samples of all of them."""
        each = over_ranks(float(len(values)))
        mean = over_ranks(values.sum().item()) / each
        # The second pass around the mean: squares of values would lose what small differences have.
        variance = over_ranks((values - mean).square().sum().item()) / each
        return cls(mean, math.sqrt(variance / max(count - 1.0, 1.0)) if math.isfinite(variance) else math.inf)

    @property
    def is_positive(self) -> bool:
        return self.mean > SURE * self.error

    def root(self) -> Estimate:
        """Of the mean's square root, where values are squared errors."""
        root = math.sqrt(self.mean) if self.mean >= 0 else math.nan
        return Estimate(root, self.error / (2 * root) if root > 0 else 0.0)

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.error:.1g}"


@dataclass(frozen=True)
class Seen:
    """One measurement. Differences are those of squared errors, each sample's with its own: positive means worse.

    count: Samples. error, untrained: Root mean square errors of the student and of an untrained network. worse: The student's
    beyond the untrained network's and a tie. far: Beyond the untrained network's and the tolerance. rise: Beyond the best
    measurement's and the tolerance; None: there is no best. spikes: Do the run's losses rise?
    """

    count: int
    error: Estimate
    untrained: Estimate
    worse: Estimate
    far: Estimate
    rise: Estimate | None = None
    spikes: bool = False


@dataclass
class Watch:
    """What is to be said of a run's held-out errors: a warning where training makes the student worse, beyond doubt."""

    rule: WatchSettings
    best: float = math.inf
    """Least error so far."""
    helped: bool = False
    """Has the student been better than an untrained network?"""
    suspicious: bool = False
    """Was the last measurement worse than an untrained network's?"""

    def wants_measurement(self, steps: int) -> bool:
        """After so many training steps of the run? A rule of steps alone, so that all ranks measure together."""
        every = self.rule.every
        return steps > 0 and (steps % every == 0 or steps in (min(EARLY, max(every // 4, 1)), every // 4, every // 2))

    def observe(self, steps: int, seen: Seen) -> tuple[int, str]:
        """Take note of a measurement; NaN and infinity are worse than any number.

        Returns:
            Level (logging.INFO or logging.WARNING) and text of what the run's log should say.

        Raises:
            ValueError: student and untrained network are at their teacher's end to the last bit: there is nothing to learn.
        """
        if seen.error.mean == 0.0 == seen.untrained.mean:
            raise ValueError(
                f"held-out error 0 of 0 after {steps} training steps: the teacher's path is what one step a window of an "
                "untrained student is already, so there is nothing to learn. Give the teacher more steps "
                "(teacher.steps_per_window) or guidance, and check that its weights are trained"
            )
        text = f"PeRFlow after {steps} training steps: held-out error {seen.error} on {seen.count} samples, of an untrained "
        text += f"network {seen.untrained}"
        best, helped, again = self.best, self.helped, self.suspicious
        self._note(seen)
        if not math.isfinite(seen.error.mean):
            return logging.WARNING, f"{text}. The student's ends are not finite; its weights are probably broken"
        if steps < self.rule.every // 4 or seen.count < ENOUGH:
            self.suspicious = False  # the first steps of a good run may lose a little
            return logging.INFO, text + (f"; {ENOUGH} samples are needed to judge" if seen.count < ENOUGH else "")
        if self.suspicious and (again or helped or seen.spikes or seen.far.is_positive):
            return logging.WARNING, (
                f"{text}. The student ends further from its teacher than a network that was not trained at all, by more than "
                f"{SURE:g} standard errors; {_cause(helped, seen)}"
            )
        if seen.rise is not None and seen.rise.is_positive:
            return logging.WARNING, (
                f"{text}, best so far {best:.4g}. It rises, by more than {SURE:g} standard errors over a tolerance of "
                f"{self.rule.tolerance:g}: the learning rate is probably too high; keep the checkpoint of the best"
            )
        return logging.INFO, text

    def _note(self, seen: Seen) -> None:
        self.suspicious = seen.worse.is_positive
        if math.isfinite(seen.error.mean):
            self.best = min(self.best, seen.error.mean)
            self.helped = self.helped or seen.error.mean < seen.untrained.mean

    def restart(self) -> None:
        """Other windows, samples or another teacher: errors from here on do not compare with those before."""
        self.best, self.helped, self.suspicious = math.inf, False, False


def _cause(helped: bool, seen: Seen) -> str:
    if helped or seen.spikes or seen.far.is_positive:
        why = (
            "it was better before"
            if helped
            else "the losses rise"
            if seen.spikes
            else "training took it far from where it began"
        )
        return f"{why}, so the learning rate is probably too high: lower it, or check grad_clip and the warm-up"
    return (
        "it was never better, and the losses do not rise. If the next lines say so too, compare with a run at another learning "
        "rate, and check that teacher and data fit (what the first step's line says)"
    )
