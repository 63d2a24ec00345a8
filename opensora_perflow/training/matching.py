"""The settings of distribution matching, see fake_score.py."""

from __future__ import annotations

from dataclasses import dataclass

from opensora_perflow.checks import check_keys, key, number, whole


@dataclass(frozen=True)
class MatchingSettings:
    """How the student's distribution is matched."""

    weight: float = key(0.5, number(above=0))
    """Of the matching term beside the regression, > 0."""
    updates: int = key(1, whole(high=100))
    """Steps of the adapters' optimizer in each training step, >= 1. One costs an evaluation with its gradient."""
    rank: int = key(16, whole())
    """Of the adapters, >= 1, which all linear layers get."""
    rate: float = key(1e-3, number(above=0))
    """Learning rate of the adapters, > 0."""

    def __post_init__(self) -> None:
        check_keys(self, "matching.")
