"""Fewer windows stage by stage: 8 -> 4 -> 2 -> 1, each stage as long as its held-out error falls.

Neighbouring windows are merged, so the edges of a stage are among those of the stage before. The teacher of a merged window is
the original one, across all of it. Or it is the student of the stage before, with one step for each of its windows: progressive
distillation over windows. One window is InstaFlow.

Source: ProReflow (arXiv:2503.04824), progressive reflow; progressive distillation (arXiv:2202.00512); InstaFlow
(arXiv:2309.06380).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from opensora_perflow.checks import MOST_WINDOWS, check_keys, choice, key, listed, number, optional, shown, whole
from opensora_perflow.method.grids import sampling_grid
from opensora_perflow.method.windows import TimeWindows

logger = logging.getLogger("opensora_perflow")

TEACHERS = ("original", "previous")
COUNTS = listed(whole(high=MOST_WINDOWS), "a list of numbers", "[8, 4, 2, 1]")
"""What curriculum.windows holds."""


@dataclass(frozen=True)
class AdvanceRule:
    """When a stage ends: its held-out error has stopped falling, or it has had its steps."""

    min_steps: int = key(200, whole())
    """Training steps that every stage has at least, >= 1."""
    max_steps: int = key(2000, whole())
    """Training steps that a stage has at most (up to the next measurement), >= min_steps."""

    every: ClassVar[int] = 25
    """Training steps between two measurements."""
    patience: ClassVar[int] = 2
    """Measurements in a row without an improvement that end the stage."""
    min_improvement: ClassVar[float] = 0.05
    """Share of the best error by which another must lie below it to count as an improvement."""

    def __post_init__(self) -> None:
        check_keys(self, "curriculum.advance.")
        if self.min_steps > self.max_steps:
            raise ValueError(
                f"curriculum.advance.min_steps must not exceed max_steps, got {self.min_steps} and {self.max_steps}"
            )


@dataclass
class Progress:
    """Where a curriculum is; a few numbers, so that a run can be resumed."""

    stage: int = 0
    step: int = 0
    """Training steps taken in this stage."""
    best: float = math.inf
    """Least held-out error of this stage."""
    stale: int = 0
    """Measurements since then."""


def progress(name: str, state: Any) -> dict[str, Any]:
    """What `Curriculum.state` gave, see checks.py."""
    kinds = {"stage": whole(0), "step": whole(0), "best": optional(number(low=0, most=1e308)), "stale": whole(0)}
    if not isinstance(state, Mapping) or set(state) != set(kinds):
        got = ", ".join(map(str, state)) if isinstance(state, Mapping) and len(state) < 20 else shown(state)
        raise ValueError(f"a curriculum's state has the keys {', '.join(kinds)}, got {got}")
    return {one: kind(f"{name}.{one}", state[one]) for one, kind in kinds.items()}


def merge_windows(windows: TimeWindows, num_windows: int) -> TimeWindows:
    """Neighbouring windows put together, equally many for each of the new ones.

    Raises:
        ValueError: num_windows does not divide the number of windows.
    """
    if windows.num_windows % num_windows:
        raise ValueError(
            f"{windows.num_windows} windows cannot be merged evenly into {num_windows}; write for example [8, 4, 2, 1]"
        )
    return TimeWindows(sampling_grid(windows, num_windows))


@dataclass
class Curriculum:
    """The stages of a run, and which one it is in.

    Args:
        windows: The first stage's.
        counts: Number of windows of every stage, the first one's included, descending; each divides the one before.
        teacher: "original" or "previous", see above.
        rule: When a stage ends.

    Raises:
        ValueError: counts that do not begin with the number of windows, do not descend or do not divide; an unknown teacher.
    """

    windows: TimeWindows
    counts: Sequence[int]
    teacher: str = "original"
    rule: AdvanceRule = field(default_factory=AdvanceRule)

    def __post_init__(self) -> None:
        self.teacher = choice(*TEACHERS)("curriculum.teacher", self.teacher)
        counts = list(COUNTS("curriculum.windows", self.counts))
        if len(counts) < 2 or any(before <= after for before, after in zip(counts, counts[1:])):
            raise ValueError(f"curriculum.windows must be two or more descending numbers, got {counts}; write [8, 4, 2, 1]")
        if counts[0] != self.windows.num_windows:
            raise ValueError(
                f"curriculum.windows begins with {counts[0]} windows, but the config's windows are "
                f"{self.windows.num_windows}; write windows={counts[0]}"
            )
        self.windows = TimeWindows(self.windows.edges)  # a plan's sampling grids are not the merged windows' own
        self.stages = [self.windows]
        for count in counts[1:]:
            self.stages.append(merge_windows(self.stages[-1], count))
        self.progress = Progress()

    @property
    def current(self) -> TimeWindows:
        """The windows of this stage."""
        return self.stages[self.progress.stage]

    @property
    def is_last(self) -> bool:
        return self.progress.stage == len(self.stages) - 1

    @property
    def teacher_is_student(self) -> bool:
        """Is this stage taught by the student of the one before (whose guidance is folded in, and which takes Euler steps)?"""
        return self.teacher == "previous" and self.progress.stage > 0

    def solver_grids(self, steps_per_window: int) -> Tensor:
        """The teacher's steps in each window of this stage, [K, S + 1], float64, untransformed.

        The original teacher keeps the step size that it has in the first stage, `steps_per_window` there, so that S grows as
        windows merge. A student of the stage before takes its own windows.
        """
        finer = self.stages[self.progress.stage - 1] if self.teacher_is_student else self.windows
        each = 1 if self.teacher_is_student else steps_per_window
        grid = torch.tensor(sampling_grid(finer, finer.num_windows * each), dtype=torch.float64)
        steps = (len(grid) - 1) // self.current.num_windows
        return grid.unfold(0, steps + 1, steps)

    def wants_measurement(self) -> bool:
        """Is it time to measure the held-out error? A rule of steps alone, so that all ranks measure together."""
        return not self.is_last and self.progress.step % self.rule.every == 0

    def observe(self, error: float) -> bool:
        """Take note of a measurement; has the stage ended? The caller then calls `advance`.

        A NaN or infinite error counts as no improvement.
        """
        progress, rule = self.progress, self.rule
        if error < progress.best * (1.0 - rule.min_improvement):
            progress.best, progress.stale = error, 0
        else:
            progress.stale += 1
        done = progress.stale >= rule.patience and progress.step >= rule.min_steps
        return not self.is_last and (done or progress.step >= rule.max_steps)

    def advances(self, error: float) -> bool:
        """Take note of a measurement, and begin the next stage where this one has ended."""
        if not self.observe(error):
            return False
        logger.info(
            "PeRFlow curriculum: %d windows -> %d after %d steps; held-out velocity error %.4g, best %.4g",
            self.current.num_windows,
            self.stages[self.progress.stage + 1].num_windows,
            self.progress.step,
            error,
            self.progress.best,
        )
        self.advance()
        return True

    def forget_errors(self) -> None:
        """Errors from here on are measured on other batches, and do not compare with those before."""
        self.progress.best, self.progress.stale = math.inf, 0

    def advance(self) -> None:
        """Begin the next stage."""
        self.progress = Progress(stage=self.progress.stage + 1)

    def state(self) -> dict[str, Any]:
        """The progress as plain numbers that JSON can hold; `best` is None before the first measurement of a stage."""
        values = dict(vars(self.progress))
        return {**values, "best": None if math.isinf(values["best"]) else values["best"]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`.

        Raises:
            ValueError: not a state, or a stage that this curriculum does not have.
        """
        state = progress("curriculum", state)
        if not 0 <= state["stage"] < len(self.stages):
            raise ValueError(
                f"the state is in stage {state['stage']}, this curriculum has the stages 0..{len(self.stages) - 1}; "
                "resume with the curriculum.windows that the run began with"
            )
        self.progress = Progress(**{**state, "best": math.inf if state["best"] is None else state["best"]})
