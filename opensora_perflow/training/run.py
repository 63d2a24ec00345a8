"""A training run: one step after the other, and what has to be remembered in between."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from opensora_perflow.method.draws import Drawn, draw
from opensora_perflow.method.grids import linear_grid
from opensora_perflow.method.segment import Segment
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.objectives import Objective
from opensora_perflow.training.agreement import check_agreement, settings_of
from opensora_perflow.training.blame import NotFinite, bad_loss, explained
from opensora_perflow.training.curriculum import Curriculum
from opensora_perflow.training.fake_score import FakeScore
from opensora_perflow.training.first_step import check_teacher, check_trainable
from opensora_perflow.training.host import Host
from opensora_perflow.training.monitor import Monitor
from opensora_perflow.training.observer import Observer
from opensora_perflow.training.players import Batch
from opensora_perflow.training.randomness import TrainingRandomness, step_generator
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.segments import Segments, Solved, Stored
from opensora_perflow.training.state import StudentState, check_resumed, find_state
from opensora_perflow.training.step import distil
from opensora_perflow.training.store import ChainStore
from opensora_perflow.training.teacher import Teacher, copy_frozen, first_teacher, stored_teacher
from opensora_perflow.training.vitals import RecordedField

logger = logging.getLogger("opensora_perflow")


def known_of(recipe: Recipe, curriculum: Curriculum | None, run: TrainingRun | None) -> dict[str, Any]:
    """The part of a student's state that no host has to do with; `run` None: nothing was trained."""
    draws, randomness = asdict(recipe.draws), None if run is None else run.randomness
    known = {
        "guidance": asdict(recipe.guidance),
        "curriculum": None if curriculum is None else curriculum.state(),
        "objective": recipe.objective,
        "draws": draws if randomness is None else {**draws, "seed": randomness.seed},
        "steps": 0 if randomness is None else randomness.steps,
    }
    if run is not None:
        teacher = run.teacher
        known |= {"teacher": teacher.fingerprint, "teacher_source": teacher.source, "stage": teacher.stage}
    return known


class TrainingRun:
    """What a run remembers: its teacher, its place in the curriculum, its random numbers and what it measures itself on.

    A run exists from the first training step on. `TrainingRun.begin` makes it.
    """

    examiner: ClassVar[Callable[[TrainingRun, Batch, nn.Module], None] | None] = None
    """Shown each training step's batch and student, where `look` is called; `opensora-perflow doctor` sets it."""

    def __init__(
        self, recipe: Recipe, host: Host, teacher: Teacher, curriculum: Curriculum | None, store: ChainStore | None = None
    ) -> None:
        self.recipe, self.host, self.teacher, self.curriculum, self.store = recipe, host, teacher, curriculum, store
        self.monitor = Monitor(recipe.watch)
        self.observer = Observer(recipe, host, self.windows.edges, self.keep_state)
        self.randomness: TrainingRandomness | None = None
        self.fake = None if recipe.matching is None else FakeScore(teacher.network, recipe.matching)
        self.looked = False
        """Was the teacher compared with data?"""
        self.shares = 1
        """Data-parallel shares that the samples are split into."""

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        host: Host,
        model: nn.Module,
        curriculum: Curriculum | None,
        describe: Callable[[TrainingRun], StudentState],
        host_keys: Mapping[str, Any] = MappingProxyType({}),
        store: ChainStore | None = None,
    ) -> TrainingRun:
        """The run that starts with this step, or goes on from a loaded checkpoint.

        Args:
            recipe, host: See there.
            model: The student, wrapped or bare; its weights become the teacher's where the recipe names no other.
            curriculum: The stages of the run, at their beginning.
            describe: What is kept beside each checkpoint, see state.py.
            host_keys: The host's own settings, which all processes have to share.
            store: Chains that take the teacher's place; None: the teacher solves.

        Raises:
            ValueError: no teacher can be had (see teacher.first_teacher), the checkpoint was trained with other settings, or
                the processes of this run have different ones.
        """
        settings = recipe.teacher
        teacher = first_teacher(settings, model, host) if store is None else stored_teacher(settings, model, host, store)
        run = cls(recipe, host, teacher, curriculum, store)
        run._resume(model, describe)
        run.shares = check_agreement(settings_of(recipe, describe(run), host_keys), host)
        run.monitor = Monitor(recipe.watch, run.randomness.rank, run.shares)
        run.observer.restart_at(run.windows.edges)
        run.observer.begin(describe(run))
        return run

    @property
    def windows(self) -> TimeWindows:
        """The student's windows: the recipe's, or those of the curriculum's stage."""
        return self.recipe.windows if self.curriculum is None else self.curriculum.current

    @property
    def solver_grids(self) -> Tensor:
        """The teacher's steps in each window, [K, S + 1], float64, untransformed."""
        if self.curriculum is not None:
            return self.curriculum.solver_grids(self.recipe.teacher_steps)
        edges = torch.tensor(self.windows.edges, dtype=torch.float64)
        return linear_grid(edges[:-1], edges[1:], self.recipe.teacher_steps).T

    def draw(
        self,
        windows: WarpedWindows,
        generator: torch.Generator,
        *,
        grids: Sequence[TimeWindows] = (),
        single: bool = False,
        num_levels: int | None = None,
        given: Tensor | None = None,
        given_only: bool = False,
        as_given: bool = False,
    ) -> Drawn:
        """This step's windows and times as the recipe wants them; `single`: one time a sample. Others as `draws.draw`."""
        draws = self.recipe.draws
        return draw(
            windows,
            solver_steps=self.recipe.teacher_steps if self.curriculum is None else self.solver_grids,
            edge_mass=draws.edge_mass,
            per_solve=1 if single else self.recipe.times_a_solve,
            shares=draws.shares,
            overlap=draws.overlap,
            grids=grids,
            num_levels=num_levels,
            given=given,
            given_only=given_only,
            as_given=as_given,
            generator=generator,
        )

    def keep_state(self) -> Callable[[], None]:
        """Copies the state that training steps change: the host's, and matching's adapters. Returns what puts all back."""
        parts = [self.host.keep_state(), *([] if self.fake is None else [self.fake.keep_state()])]

        def put_back() -> None:
            for part in parts:
                part()

        return put_back

    def step(self, batch: Batch, objective: Objective, model: nn.Module) -> Tensor:
        """The losses [B] of one step; with gradients enabled also what belongs before and after a step."""
        if torch.is_grad_enabled():
            self.look(batch, model)
        return self.learn(batch, self.solve(batch, model), objective, model)

    def look(self, batch: Batch, model: nn.Module) -> None:
        """Say what can be seen before the first step; nothing at later calls.

        Raises:
            ValueError: see first_step.check_trainable and first_step.check_teacher.
        """
        if TrainingRun.examiner is not None:
            TrainingRun.examiner(self, batch, model)
        if self.looked:
            return
        self.looked = True
        check_trainable(model)
        if self.store is not None:  # its teacher is not here
            if self.store.over_data and self.recipe.watch is not None and self.randomness.rank == 0:
                logger.info(
                    "PeRFlow measures no held-out error: the store's windows start at data, and no path from noise is known; "
                    "compare the student with its teacher by `opensora-perflow curve`"
                )
            return
        report = check_teacher(batch, self.host, guided=self.teacher.is_student or self.recipe.teacher.allow_distilled)
        if self.randomness.rank == 0:
            logger.log(report.level, report.text)

    def solve(self, batch: Batch, model: nn.Module) -> Segment:
        """The first half of a step: the teacher's solution of the windows that were drawn."""
        if torch.is_grad_enabled() and self.observer.remedies.policy != "warn":
            self.host.settled(model)  # the last step's weights may still be on their way
            self.observer.before_step(self.randomness.steps - 1)
        try:
            return self.segments.of(batch)
        except NotFinite as error:
            raise self._explained(error, batch, model) from None

    def learn(self, batch: Batch, segment: Segment, objective: Objective, model: nn.Module) -> Tensor:
        """The second half of a step: the losses [B]; with gradients enabled the run also measures itself."""
        student = RecordedField(batch.players.student.velocity(segment.bounds))
        try:
            asked = self.observer.measures or self.fake is not None  # for the student's answer, afterwards
            loss = distil(batch, objective, segment, student if asked else student.field)
            if not torch.isfinite(loss.detach()).all():
                raise bad_loss(batch, loss)
            if torch.is_grad_enabled():  # not where losses are only evaluated
                if self.observer.measures:
                    teacher = self.teacher.network if self.store is None else None
                    self.observer.after_loss(self.randomness.steps - 1, batch, segment, loss, student, model, teacher)
                self._measure(batch, loss, model)
                if self.fake is not None:
                    loss = loss + self._matched(batch, segment, student)
            return loss
        except NotFinite as error:
            raise self._explained(error, batch, model) from None

    def _matched(self, batch: Batch, segment: Segment, student: RecordedField) -> Tensor:
        """What matching adds to the losses [B]: a gradient, and no value."""
        random, device = self.randomness, batch.data.device
        generator = step_generator(random.seed, random.rank, random.steps - 1, device=device, purpose="matching")
        return self.fake.term(batch, segment, student.end(segment.t_end), generator, self.host)

    def _explained(self, error: NotFinite, batch: Batch, model: nn.Module) -> ValueError:
        return explained(error, batch, self.randomness.steps, {"the student": model, "the teacher": self.teacher.network})

    @property
    def segments(self) -> Segments:
        """Where segments come from. A student of the stage before takes the Euler steps that it was trained for."""
        if self.store is not None:
            numbers = self.randomness
            return Stored(self.store, step_generator(numbers.seed, numbers.rank, numbers.steps, purpose="further"))
        solver = "euler" if self.teacher.is_student else self.recipe.teacher.solver
        return Solved(self.recipe.draws.starts, solver, self.teacher.source)

    def change(self, recipe: Recipe, curriculum: Curriculum | None) -> None:
        """Go on with another recipe (Open-Sora's gradio app re-initialises its live scheduler). The teacher stays.

        Raises:
            ValueError: the recipe names another teacher or other matching, or needs the first teacher where a student took
                its place.
        """
        named, was = recipe.teacher.from_pretrained, self.recipe.teacher.from_pretrained
        if named is not None and named != was:
            raise ValueError(
                f"this run is taught by {self.teacher.source}; teacher.from_pretrained={named!r} would change that in its "
                "middle. Build a new scheduler for another teacher"
            )
        if self.teacher.is_student and curriculum is not self.curriculum:
            raise ValueError(
                f"this run is taught by {self.teacher.source}, and the first teacher is gone; another curriculum needs a new "
                "scheduler"
            )
        if recipe.teacher.stored != self.recipe.teacher.stored:
            raise ValueError(f"this run is taught by {self.teacher.source}; another store, or none, needs a new scheduler")
        if recipe.matching != self.recipe.matching:
            raise ValueError(
                f"this run began with matching={self.recipe.matching}, and its adapters are those; other settings need a new "
                f"scheduler, got matching={recipe.matching}"
            )
        measured_by = ("watch", "windows", "teacher", "guidance")
        changed = any(getattr(recipe, name) != getattr(self.recipe, name) for name in measured_by)
        if changed or curriculum is not self.curriculum:
            self.monitor = Monitor(recipe.watch, self.randomness.rank, self.shares)
            self.observer = Observer(recipe, self.host, self.windows.edges, self.keep_state)
        self.recipe, self.curriculum = recipe, curriculum

    def _resume(self, model: nn.Module, describe: Callable[[TrainingRun], StudentState]) -> None:
        """Count steps from where a loaded checkpoint stopped, and have the next checkpoints say where that is."""
        recipe, loaded, steps = self.recipe, self.host.resumed(), 0
        seed = self.host.seed() if recipe.draws.seed is None else recipe.draws.seed
        found = None if loaded is None else find_state(loaded[0])
        if found is not None:
            state, where = found
            if self.curriculum is not None and state.curriculum is not None and loaded[1]:
                self.curriculum.restore(state.curriculum)
                self.curriculum.forget_errors()  # the batches that they were measured on are not kept
                if self.curriculum.teacher_is_student:
                    self._teach_by(model)  # the checkpoint does not hold the student that taught until now
            check_resumed(state, describe(self), where, recipe.allow_change)
            seed, steps = state.draws.get("seed") if seed is None else seed, state.steps if loaded[1] else 0
            weights = self.host.restore(model)
            if self.fake is not None and loaded[1]:
                self.fake.load(where.parent)
            logger.info(
                "PeRFlow goes on after %d training steps (%s): with the draws of an unbroken run, and with %s",
                steps, where, weights,
            )  # fmt: skip
        elif loaded is not None:
            logger.info(
                "PeRFlow counts its steps from 0: %s has no perflow.json, so nothing is known of its windows", loaded[0]
            )
        (seed,) = self.host.shared(torch.initial_seed() if seed is None else seed)
        self.randomness = TrainingRandomness(seed, self.host.rank(), steps)
        self.host.before_each_save(lambda folder: self._save(folder, describe(self)))

    def _save(self, folder: Path, state: StudentState) -> None:
        if self.fake is not None:
            self.fake.save(folder)
        self.observer.save(folder, state)

    def _measure(self, batch: Batch, loss: Tensor, model: nn.Module) -> None:
        """Keep samples of the first batches. Measure where it is time to, and begin the next stage where one has ended."""
        curriculum, watch = self.curriculum, self.monitor.watch
        if watch is not None:
            self.monitor.note_loss(loss)
        measures = (watch is not None or curriculum is not None) and (self.store is None or not self.store.over_data)
        if measures and self.monitor.needs_samples:
            self.monitor.keep(batch, self.recipe.guidance, lambda: self.segments)
            if self.store is not None:  # what an untrained network does has to be seen now: no copy of it is kept
                self.monitor.batches[-1].squared_ends(self.solver_grids)
        steps = self.randomness.steps - 1  # the optimizer's step is to come
        watched = bool(self.monitor.batches) and watch is not None and watch.wants_measurement(steps)
        staged = curriculum is not None and curriculum.wants_measurement()
        grids = self.solver_grids if watched or staged else None
        if watched:
            seen = self.monitor.observe(steps, grids, self.host)
            self.observer.held_out(steps, *seen)
        if staged and curriculum.advances(self.monitor.velocity_error(grids, self.host)):
            if curriculum.teacher_is_student:
                self._teach_by(model)
            self.monitor.restart()
            self.observer.restart(steps, self.windows.edges)
        elif curriculum is not None:
            curriculum.progress.step += 1

    def _teach_by(self, model: nn.Module) -> None:
        """The student as it is becomes the teacher of this stage. The fingerprint stays that of the original one."""
        stage = self.curriculum.progress.stage + 1
        self.teacher = self.teacher.replaced_by(
            copy_frozen(self.host.settled(model), share_untrained=True),
            f"the student, as it came to stage {stage} of the curriculum",
        )
