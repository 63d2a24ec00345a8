"""Evaluations of the network in one training step, in forwards of the batch."""

from __future__ import annotations

from dataclasses import dataclass

from opensora_perflow.training.recipe import Recipe

EVALUATIONS = {"euler": 1, "midpoint": 2}
"""Of a step of the teacher's solver."""


@dataclass(frozen=True)
class Units:
    """Mean evaluations a step. way: Of the student, on its way to the window. teacher: Of the teacher. trained: Of the student,
    with a gradient."""

    way: float
    teacher: float
    trained: int

    @classmethod
    def of(cls, recipe: Recipe | None) -> Units:
        """None: the host's own training."""
        if recipe is None:
            return cls(0.0, 0.0, 1)
        if recipe.teacher.stored is not None:
            return cls(0.0, 0.0, recipe.times_a_solve)
        branches = 1 if recipe.guidance.mode == "sync" or recipe.guidance.scale == 1 else 2
        way = 0.0
        if recipe.draws.starts == "student":  # half of the windows before the drawn one, guided as sampled
            way = (recipe.windows.num_windows - 1) / 2 * (1 if recipe.guidance.folded else 2)
        return cls(way, recipe.teacher_steps * EVALUATIONS[recipe.teacher.solver] * branches, recipe.times_a_solve)

    def forwards(self, checkpointing: bool, adapters: bool) -> float:
        """All of a step: a backward is two forwards, and one where the weights are frozen; checkpointing computes one more."""
        return self.way + self.teacher + self.trained * (2 + (not adapters) + checkpointing)
