"""A weighted sum of objectives, as configs write it."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opensora_perflow.checks import is_list, number, shown
from opensora_perflow.method.segment import Segment
from opensora_perflow.method.solvers import Velocity, remember_last
from opensora_perflow.registry import OBJECTIVES

Objective = Callable[[Velocity, Segment, Tensor, "Tensor | None"], Tensor]
"""objective(student, segment, t, frame_weights) -> loss [B]."""


def combine(value: Any) -> Objective:
    """The objective that a config describes.

    Args:
        value: A registered name; dict(type=name, weight=1.0, its keywords); or a list of those, whose losses are added.

    Raises:
        ValueError: an unknown name or keyword, a keyword's value that the objective refuses, an empty list, or a weight that
            is not a number >= 0.
    """
    items = list(value) if is_list(value) else [value]
    if not items:
        raise ValueError("objective must name at least one objective, got an empty list")
    terms = [_term(item) for item in items]
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]

    def weighted_sum(student: Velocity, segment: Segment, t: Tensor, frame_weights: Tensor | None = None) -> Tensor:
        field = remember_last(student)
        return sum(weight * objective(field, segment, t, frame_weights) for weight, objective in terms)

    return weighted_sum


def _term(value: Any) -> tuple[float, Objective]:
    settings = {"type": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    name, weight = settings.pop("type", None), settings.pop("weight", 1.0)
    objective = OBJECTIVES.module_dict.get(name) if isinstance(name, str) else None
    if objective is None:
        known = ", ".join(sorted(OBJECTIVES.module_dict))
        raise ValueError(
            f"objective must be one of {known}, dict(type=one of them, ...), or a list of those, got {shown(value)}"
        )
    weight = number(low=0)(f"the weight of objective {name!r}", weight)
    known = list(inspect.signature(objective).parameters)[4:]
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ValueError(f"unknown key(s) {unknown} for objective {name!r}; known: {', '.join(['weight', *known])}")
    if settings:
        objective = partial(objective, **settings)
        _try(objective, name, settings)
    return float(weight), objective


def _try(objective: Objective, name: str, settings: Mapping[str, Any]) -> None:
    """One call on a window of two frames: what it says of its keywords is said before a teacher is loaded."""
    x = torch.zeros(1, 4, 2, 2, 2)
    t_start, t_end = torch.tensor([[0.5], [0.25]], dtype=torch.float64)
    segment = Segment(x, x, t_start, t_end, torch.stack([x, x]), torch.stack([t_start, t_end]))
    try:
        objective(lambda x, t: x, segment, t_start, None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"objective {name!r} does not take {dict(settings)}: {error}") from error
