"""Checks of what a config holds, said alike everywhere: what was received, what is accepted, how to mend it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from numbers import Real
from typing import Any


def from_mapping(cls: type, value: Mapping[str, Any], where: str) -> Any:
    """Build a settings dataclass from a config dict, refusing keys that it does not have.

    Raises:
        ValueError: unknown keys (with the closest known ones), or values that the dataclass refuses.
    """
    refuse_unknown(value, [f.name for f in fields(cls)], where)
    return cls(**value)


def refuse_unknown(keys: Iterable[Any], known: Sequence[str], where: str) -> None:
    """Raises ValueError for keys that are not among the known ones, with the closest of these."""
    unknown = [key for key in keys if key not in known]
    if unknown:
        close = [match for key in unknown for match in difflib.get_close_matches(str(key), known, n=1)]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"unknown key(s) {', '.join(map(repr, unknown))} in {where}{hint} Known keys: {', '.join(known)}")


def check_number(name: str, value: Any, low: float | None = None, high: float | None = None) -> None:
    """Raises ValueError unless value is a real number (and at least `low`, and at most `high`)."""
    out = isinstance(value, Real) and ((low is not None and not value >= low) or (high is not None and not value <= high))
    if isinstance(value, bool) or not isinstance(value, Real) or out:
        bound = ("" if low is None else f" >= {low:g}") + ("" if high is None else f" and <= {high:g}")
        raise ValueError(f"{name} must be a number{bound}, got {value!r}")


def check_path(name: str, value: Any, accepted: str) -> None:
    """Raises ValueError unless value is a string or a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def check_switch(name: str, value: Any) -> None:
    """Raises ValueError unless value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def as_scales(name: str, value: Any, num_windows: int | None = None) -> Any:
    """A guidance scale >= 0 as it is, or a list of them as a tuple.

    Raises:
        ValueError: anything else, or a list without exactly one number a window.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        check_number(name, value, low=0)
        return value
    for i, scale in enumerate(value):
        check_number(f"{name}[{i}]", scale, low=0)
    if num_windows is not None and len(value) != num_windows:
        raise ValueError(
            f"{name} must be one number, or one for each of the {num_windows} windows, noisiest first, got {list(value)}"
        )
    return tuple(value)


def check_num_steps(num_steps: int, name: str = "the number of steps") -> None:
    """Raises ValueError unless num_steps is an integer >= 1."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, Real) or int(num_steps) != num_steps or num_steps < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {num_steps!r}")
