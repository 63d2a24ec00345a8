"""Looks after a run: measures its steps, keeps the record, and has the guard's breaches dealt with."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from opensora_perflow.method.segment import Segment
from opensora_perflow.training.guard import Breach, Guard
from opensora_perflow.training.host import Host
from opensora_perflow.training.players import Batch
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.record import FORMAT, Record
from opensora_perflow.training.remedies import Remedies
from opensora_perflow.training.state import StudentState, write_state
from opensora_perflow.training.vitals import Instruments, RecordedField, Vitals

if TYPE_CHECKING:
    from opensora_perflow.training.watch import Seen

logger = logging.getLogger("opensora_perflow")

FIRST_STEPS = 8
"""What the doctor looks at."""
BROKEN = Breach(
    "broken weights",
    "the student's weights hold NaN or infinity: the last step's gradient was not finite; lower the learning rate, check "
    "grad_clip and the warm-up, and use bf16 where it is fp16",
    curable=True,
)
SHOWN = ("loss", "update", "grad_norm")
"""Of a step, for the host's TensorBoard and wandb."""


class Observer:
    """One run's.

    Args:
        recipe, host: See there.
        edges: The windows', in untransformed time.
        keep_state: See remedies.Remedies.
    """

    def __init__(
        self, recipe: Recipe, host: Host, edges: Sequence[float], keep_state: Callable[[], Callable[[], None]]
    ) -> None:
        self.recipe, self.host = recipe, host
        self.record = Record(host.folder())
        self.guard = None if recipe.watch is None else Guard(edges)
        self.remedies = Remedies("warn" if recipe.watch is None else recipe.watch.policy, host, keep_state)
        self.measures = self.guard is not None or self.record.path is not None
        """Does anybody read what steps show? A measurement costs a wait for the device."""
        self.instruments: Instruments | None = None
        self.seen: list[Vitals] = []
        """Of the first steps, up to FIRST_STEPS."""
        self.rate: float | None = None
        self._broken_at = -1
        """Step at whose beginning weights were last seen not to be finite."""
        self._began = time.time()

    def begin(self, state: StudentState) -> None:
        """The line that a run, or its next part, begins with."""
        known = asdict(state)
        self.record.write(
            "begin", state.steps, format=FORMAT, version=state.version, time=round(self._began), windows=list(state.windows),
            recipe=known_recipe(self.recipe), state=known,
        )  # fmt: skip

    def before_step(self, step: int) -> None:
        """Deal with what the step before showed, where the policy does more than warn.

        Raises:
            ValueError: see remedies.Remedies.act.
        """
        if self.remedies.policy == "rollback" and self.instruments is not None and not self.instruments.weights_are_finite:
            # Once more at the step after older weights are back: no rate mends that, and the step says what is wrong.
            if self._broken_at != step - 1:
                self.report(step, BROKEN)
            self._broken_at = step
        back = self.remedies.act(step)
        if back is not None:
            self.record.write("rollback", step, to=back)
            self.instruments.forget_move()
            self.guard.go_back()

    def after_loss(
        self,
        step: int,
        batch: Batch,
        segment: Segment,
        loss: Tensor,
        field: RecordedField,
        student: nn.Module,
        teacher: nn.Module | None,
    ) -> None:
        """Measure a training step whose losses [B] are known; `teacher` None: stored chains."""
        if self.instruments is None:
            draws = self.recipe.draws
            self.instruments = Instruments(student, teacher, self.host.ema(), draws.overlap == 0 and not draws.grids)
        elif self.instruments.teacher is not teacher:
            self.instruments.teach_by(teacher)
        seen = self.instruments.read(batch, segment, loss, field)
        if len(self.seen) < FIRST_STEPS:
            self.seen.append(seen)
        self._write(step, seen)
        if self.guard is not None:
            for breach in self.guard.observe(step, seen):
                self.report(step, breach)

    def report(self, step: int, breach: Breach) -> None:
        """Say a breach, write it down, and have it dealt with. Each process tells of its own samples."""
        where = "" if breach.window is None else f" in window {breach.window}"
        logger.warning("PeRFlow after %d training steps, %s%s: %s", step, breach.cause, where, breach.text)
        self._deal_with(step, breach)

    def _deal_with(self, step: int, breach: Breach) -> None:
        policy = self.remedies.policy if breach.curable or self.remedies.policy == "stop" else "warn"
        self.record.write("breach", step, cause=breach.cause, window=breach.window, text=breach.text, policy=policy)
        self.remedies.note(breach)

    def held_out(self, step: int, level: int, text: str, seen: Seen) -> None:
        """A measurement of the monitor, of all processes: in the log, in the record, and a breach where the log warns."""
        if self.host.rank() == 0:  # the others would say the same
            logger.log(level, text)
        self.record.write(
            "held_out", step, error=seen.error.mean, error_se=seen.error.error, untrained=seen.untrained.mean,
            untrained_se=seen.untrained.error, count=seen.count,
        )  # fmt: skip
        self.host.log_scalars(step, {"held_out_error": seen.error.mean})
        if level >= logging.WARNING:
            self._deal_with(step, Breach("held-out error", text, curable=True))

    def save(self, folder: Path, state: StudentState) -> None:
        """What lies beside a checkpoint, and that there is one; see `state.write_state`."""
        write_state(folder, state)
        self.record.write("checkpoint", state.steps, folder=folder.name)

    def restart_at(self, edges: Sequence[float]) -> None:
        """A resumed run is at another stage than its first."""
        if self.guard is not None:
            self.guard.restart(edges)

    def restart(self, step: int, edges: Sequence[float]) -> None:
        """A curriculum's next stage."""
        self.record.write("stage", step, windows=list(edges))
        self.restart_at(edges)

    def _write(self, step: int, seen: Vitals) -> None:
        values: dict[str, Any] = {
            "time": time.time() - self._began,
            "loss": sum(seen.loss) / len(seen.loss),
            "data_std": sum(seen.data_std) / len(seen.data_std),
            "data_motion": sum(seen.data_motion) / len(seen.data_motion),
            "grad_norm": seen.grad_norm,
            "update": seen.update,
            "ema_update": seen.ema_update,
        }
        shown = {name: values[name] for name in SHOWN if math.isfinite(values[name])}
        self.rate = self.host.rate()
        self.host.log_scalars(step, shown)
        self.record.write("step", step, **values, **seen.by_window, rate=self.rate)


def known_recipe(recipe: Recipe) -> dict[str, Any]:
    """The method's keys with their defaults, as JSON takes them."""
    return {**asdict(recipe), "windows": list(recipe.windows.edges)}
