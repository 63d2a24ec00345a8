"""What goes wrong in a run, seen in the numbers that its steps give anyway, and named.

Each rule is a function of the history and the newest step. A rule compares a run with its own beginning: an untrained student
of one window may have half of its teacher's motion, and be healthy. Rules look at medians over several steps, so that one odd
batch is no alarm.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, pstdev

from opensora_perflow.training.vitals import Vitals

FIRST, LAST = 8, 5
"""Steps in which a window was trained: those that its baseline is made of, and those that are compared with it."""
LEAST_RISE, SPREADS = math.log(3), 3.0
"""Of log losses: a rise is at least a factor of 3, and so many standard deviations of the first ones. Healthy runs of the tiny
models rise by 1.3 at most; a learning rate that is 100 times too high raises losses by 4 to 10^6."""
LIMITS = {"spread": math.log(2.0), "motion": math.log(4.0)}
"""By how much the logarithm may leave that of the beginning. Healthy: spread .9 to 1.1 of it, motion .8 to 1.3."""
BLANK, STILL = 0.1, 1e-3
"""Latents are blank where they vary less than this part of the most varied ones; they stand still where their motion is less
than this part of their variance. Healthy clips have .2 and .9 at least."""
LARGEST_UPDATE = 0.05
"""Part of their length by which weights may move in a step. Healthy: .0004 of the video model, .014 of the mixture's small
one."""
WILD_UPDATE = 0.5
"""The same of one step: nothing of a network is left then, and the next step may give NaN."""
ENOUGH = 16
"""Samples before the data is judged."""
SHARE_BLANK, SHARE_STILL = 0.25, 0.5
MOVED = 1e-3
"""Part of its weights by which a student has moved before its EMA must have."""
QUIET = 100
"""Steps before a cause is named again."""


@dataclass(frozen=True)
class Breach:
    """cause: One word or two, as in docs/troubleshooting.md. window: Its index; None: no window's own. curable: Would another
    learning rate, or older weights, help?"""

    cause: str
    text: str
    window: int | None = None
    curable: bool = False


@dataclass
class Series:
    """A number that each step gives in one window: the first ones, and the last."""

    first: list[float] = field(default_factory=list)
    last: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))

    def add(self, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            self.first.append(value) if len(self.first) < FIRST else self.last.append(value)

    @property
    def is_known(self) -> bool:
        return len(self.last) == LAST

    @property
    def change(self) -> float:
        return median(self.last) - median(self.first)

    @property
    def deviation(self) -> float:
        return pstdev(self.first)


def _log(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else math.log(max(value, 1e-12))


class History:
    """What the rules remember.

    Args:
        edges: The windows' edges, in untransformed time.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges, self.count = tuple(edges), len(edges) - 1
        self.series = {name: [Series() for _ in range(self.count)] for name in ("loss", *LIMITS)}
        self.updates = Series()
        self.zeros = [0] * self.count
        self.samples = self.blank = self.still = 0
        self.most_varied = 0.0
        self.since_ema_moved = 0.0
        self.steps_since_ema_moved = 0

    def add(self, seen: Vitals) -> None:
        for name, group in self.series.items():
            for series, value in zip(group, seen.by_window[f"window_{name}"]):
                if value != 0.0 or name != "loss":
                    series.add(_log(value))
        for k, value in enumerate(seen.by_window["window_loss"]):
            if value is not None:
                self.zeros[k] = self.zeros[k] + seen.window.count(k) if value == 0.0 else 0
        if seen.update > 0:
            self.updates.add(_log(seen.update))
        self._add_data(seen)
        moved = not seen.ema_update == 0.0  # NaN: there is none that is known
        self.since_ema_moved = 0.0 if moved else self.since_ema_moved + (seen.update if seen.update > 0 else 0.0)
        self.steps_since_ema_moved = 0 if moved else self.steps_since_ema_moved + 1

    def _add_data(self, seen: Vitals) -> None:
        self.most_varied = max(self.most_varied, *seen.data_std)
        blank = [std <= BLANK * self.most_varied for std in seen.data_std]
        self.samples += len(blank)
        self.blank += sum(blank)
        self.still += sum(m < STILL and not b for m, b in zip(seen.data_motion, blank))

    def forget_last(self) -> None:
        """Leave the beginning of losses and ends alone; updates have another learning rate by now."""
        for series in (one for group in self.series.values() for one in group):
            series.last.clear()
        self.updates = Series()

    def named(self, k: int) -> str:
        return f"window {k} (u {self.edges[k]:.3g} -> {self.edges[k + 1]:.3g})"

    @property
    def rate(self) -> str:
        """What is said of how far the weights move."""
        if not self.updates.last:
            return ""
        now, before = (math.exp(median(values)) for values in (self.updates.last, self.updates.first))
        return f" The weights move by {now:.2g} of their length a step, and moved by {before:.2g} at first."


Rule = Callable[[History, Vitals], "Breach | None"]


def misplaced(history: History, seen: Vitals) -> Breach | None:
    """A time outside its window trains the wrong line."""
    bad = [k for k, wrong in zip(seen.window, seen.misplaced) if wrong]
    if not bad:
        return None
    return Breach(
        "window lookup",
        f"times of {len(bad)} of {len(seen.window)} samples lie outside the window that was drawn for them, or the window's "
        "edges are swapped: windows must be looked up in float64, before times are rounded (bfloat16 makes .75 of .749), "
        "and edges must descend; take back what changes draws, edges or times, or update opensora_perflow",
        bad[0],
    )


def zero_loss(history: History, seen: Vitals) -> Breach | None:
    """A window whose loss is 0 learns nothing."""
    for k, count in enumerate(history.zeros):
        if count >= FIRST:
            return Breach(
                "zero loss",
                f"the loss of {history.named(k)} is 0 for its last {count} samples, so that the window learns nothing: a "
                "mask, a loss weight or an objective takes it out; check the objective, the weights of timesteps and "
                "mask_ratios",
                k,
            )
    return None


def rising_loss(history: History, seen: Vitals) -> Breach | None:
    """A window's losses beside its own first ones."""
    for k, series in enumerate(history.series["loss"]):
        if series.is_known and series.change > max(LEAST_RISE, SPREADS * series.deviation):
            return Breach(
                "learning rate",
                f"the loss of {history.named(k)} is {math.exp(series.change):.3g} times that of the run's beginning, so the "
                f"learning rate is probably too high: lower it, or check grad_clip and the warm-up.{history.rate}",
                k,
                curable=True,
            )
    return None


def large_updates(history: History, seen: Vitals) -> Breach | None:
    """No fine-tuning moves weights so far, whatever the losses say by now."""
    steps = history.updates.first if len(history.updates.first) == FIRST else ()
    largest = max(map(median, filter(None, (steps, history.updates.last))), default=-math.inf)
    if seen.update > WILD_UPDATE:
        largest = math.log(seen.update)
    if largest < math.log(LARGEST_UPDATE):
        return None
    return Breach(
        "learning rate",
        f"the weights move by {math.exp(largest):.2g} of their length a step, so the learning rate is probably too high: "
        "lower it, or check grad_clip and the warm-up",
        curable=True,
    )


def changed_ends(history: History, seen: Vitals) -> Breach | None:
    """The student's window ends beside the teacher's: noise, one colour, or frozen motion."""
    words = {
        ("spread", True): "noise",
        ("spread", False): "one colour",
        ("motion", True): "flicker",
        ("motion", False): "frozen",
    }
    for name, limit in LIMITS.items():
        for k, series in enumerate(history.series[name]):
            if series.is_known and abs(series.change) > limit:
                what = words[name, series.change > 0]
                rises = history.series["loss"][k].is_known and history.series["loss"][k].change > 0
                why = "the learning rate is probably too high" if rises or series.change > 0 else "the student collapses"
                return Breach(
                    "learning rate" if rises or series.change > 0 else "collapse",
                    f"the {name} of the student's ends of {history.named(k)}, in parts of the teacher's, is "
                    f"{math.exp(series.change):.3g} times that of the run's beginning ({what}): {why}; lower the rate, or "
                    f"check grad_clip, the warm-up and guidance.scale.{history.rate}",
                    k,
                    curable=True,
                )
    return None


def dead_ema(history: History, seen: Vitals) -> Breach | None:
    """An EMA that does not move is sampled as the untrained network."""
    if history.steps_since_ema_moved < FIRST or history.since_ema_moved < MOVED:
        return None
    return Breach(
        "dead EMA",
        f"the EMA has not changed in {history.steps_since_ema_moved} steps, in which the student's weights moved by "
        f"{history.since_ema_moved:.2g} of their length: check ema_decay (1.0 never moves; 0.9999 never moves in bfloat16), "
        "and do not sample ema.pt",
    )


def moving_teacher(history: History, seen: Vitals) -> Breach | None:
    """A teacher is frozen."""
    if not seen.teacher_update > 0:
        return None
    return Breach(
        "student as teacher",
        f"the teacher's weights move, by {seen.teacher_update:.2g} of their length in a step: the teacher is the student "
        "itself, or shares its weights; name the original model in teacher=dict(from_pretrained=...), and train no part of it",
    )


def training_teacher(history: History, seen: Vitals) -> Breach | None:
    """Dropout in a teacher makes targets noisy."""
    if not seen.teacher_trains:
        return None
    return Breach(
        "teacher in train mode",
        "the teacher is in train mode, so that its dropout is on and two solutions of one state differ; put it into eval mode: "
        "nothing may call train() on the teacher's network",
    )


def blank_data(history: History, seen: Vitals) -> Breach | None:
    """Black clips teach black."""
    share = history.blank / max(history.samples, 1)
    if history.samples < ENOUGH or not SHARE_BLANK <= share < 1:
        return None  # all of a run without videos are blank
    return Breach(
        "blank data",
        f"{history.blank} of {history.samples} samples are blank: their latents vary less than {BLANK:g} of what the others "
        "do. Look at the videos (black or unreadable files), at the CSV's paths and at what load_video_features reads",
    )


def still_data(history: History, seen: Vitals) -> Breach | None:
    """Clips without motion teach none."""
    if history.samples < ENOUGH or history.still < SHARE_STILL * history.samples:
        return None
    return Breach(
        "static latents",
        f"{history.still} of {history.samples} samples do not move: all frames of their latents are alike. Look at the "
        "videos, at frame_interval and at the VAE (an image VAE fed with one frame again and again)",
    )


RULES: tuple[Rule, ...] = (
    misplaced,
    moving_teacher,
    training_teacher,
    zero_loss,
    dead_ema,
    blank_data,
    still_data,
    rising_loss,
    large_updates,
    changed_ends,
)
"""To add a rule, write a function and name it here, and its cause in docs/troubleshooting.md."""


class Guard:
    """Names what goes wrong, each cause once in QUIET steps.

    Args:
        edges: See `History`.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self.history = History(edges)
        self._named: dict[tuple[str, int | None], int] = {}

    def observe(self, step: int, seen: Vitals) -> list[Breach]:
        """What this step shows, and was not named lately."""
        self.history.add(seen)
        found = (rule(self.history, seen) for rule in RULES)
        return [breach for breach in found if breach is not None and self._is_news(step, breach)]

    def _is_news(self, step: int, breach: Breach) -> bool:
        key = breach.cause, breach.window
        news = step - self._named.get(key, -QUIET) >= QUIET
        if news:
            self._named[key] = step
        return news

    def go_back(self) -> None:
        """Older weights are back: what the last steps showed is of others, and a cause that comes again is news."""
        self.history.forget_last()
        self._named.clear()

    def restart(self, edges: Sequence[float]) -> None:
        """Other windows or another teacher: what comes does not compare with what was."""
        self.history = History(edges)


__all__ = ["Breach", "Guard", "RULES"]
