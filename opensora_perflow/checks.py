"""Settings, checked once and at the door: what was received, what is accepted, how to mend it.

A settings record names the kind of each of its keys beside the key's default, and `check_keys` does the rest:

    @dataclass(frozen=True)
    class Draws:
        edge_mass: float = key(0.75, number(low=0, high=1))

        def __post_init__(self) -> None:
            check_keys(self, "draws.")

A kind is a function (name, value) -> value that raises ValueError, or gives the value back in plain Python. Scalars of numpy
and torch become numbers, so that deepcopy and JSON take the value. What JSON files hold is read and checked here too.
"""

import difflib
import json
import math
import os
import reprlib
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

Kind = Callable[[str, Any], Any]

MOST_WINDOWS = 1000
"""Windows of a student, and steps of the teacher in one of them."""
MOST_STEPS = 10_000
"""Sampling steps."""
MOST_SCALE = 1000
"""Guidance."""
MOST = 10**9
"""Any other number."""
MOST_BYTES = 2**20
"""Of a JSON file that this package reads; its own are far below."""


def key(default: Any, kind: Kind, **known: Any) -> Any:
    """A dataclass field with the kind of value that it takes, and what else is known of it."""
    return field(default=default, metadata={"kind": kind, **known})


def check_keys(settings: Any, prefix: str = "") -> None:
    """Check and normalise every field of a frozen dataclass that was made with `key`, in their order."""
    for one in fields(settings):
        if "kind" in one.metadata:
            value = one.metadata["kind"](prefix + one.name, getattr(settings, one.name))
            object.__setattr__(settings, one.name, value)


# --- kinds ---


def switch(name: str, value: Any) -> bool:
    """True or False, and nothing that merely counts as one."""
    value = plain(value)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return value


def number(
    *, low: float | None = None, high: float | None = None, above: float | None = None, least: float = 0, most: float = MOST
) -> Kind:
    """A finite number in the given bounds; `most`, and `least` above 0, are how far its size makes sense."""
    bound = ("" if low is None else f" >= {low:g}") + ("" if high is None else f" and <= {high:g}")

    def check(name: str, value: Any) -> int | float:
        real = as_number(value)
        if real is None or (low is not None and not real >= low) or (high is not None and not real <= high):
            raise ValueError(f"{name} must be a number{bound}, got {shown(value)}")
        if above is not None and not real > above:
            raise ValueError(f"{name} must be > {above:g}, got {shown(value)}")
        if not least <= abs(real) <= most:
            raise ValueError(f"{name} must be finite, from {least:g} to {most:g} in size, got {shown(value)}")
        return real

    return check


def whole(low: int | None = 1, high: int = MOST, accepted: str = "", remedy: str = "") -> Kind:
    """An integer; 4.0 becomes 4."""

    def check(name: str, value: Any) -> int:
        real = as_number(value)
        if real is None or real % 1 != 0 or (low is not None and real < low):  # NaN and infinity leave NaN
            raise ValueError(f"{name} must be {accepted or f'an integer >= {low}'}, got {shown(value)}{remedy}")
        if abs(real) > high:
            raise ValueError(f"{name} must be at most {high}, got {shown(value)}{remedy}")
        return int(real)

    return check


def choice(*choices: str) -> Kind:
    """One of a few words."""

    def check(name: str, value: Any) -> str:
        value = plain(value)
        if not isinstance(value, str) or str(value) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
        return str(value)

    return check


def file_name(accepted: str) -> Kind:
    """The name of a file or folder, as text."""

    def check(name: str, value: Any) -> str:
        text = os.fspath(value) if isinstance(value, os.PathLike) else plain(value)
        if not isinstance(text, str) or not text.strip() or "\0" in text or len(text) > 4096:
            raise ValueError(f"{name} must be {accepted}, got {shown(value)}")
        return str(text)

    return check


def words(name: str, value: Any) -> str:
    """Text of at most 10,000 characters."""
    value = plain(value)
    if not isinstance(value, str) or len(value) > 10_000:
        raise ValueError(f"{name} must be text, got {shown(value)}")
    return str(value)


def optional(kind: Kind) -> Kind:
    """None, or a value of a kind."""
    return lambda name, value: None if value is None else kind(name, value)


def listed(kind: Kind, accepted: str, example: str, most: int = MOST_WINDOWS) -> Kind:
    """A list of values of a kind, as a tuple."""

    def check(name: str, value: Any) -> tuple[Any, ...]:
        if not is_list(value):
            raise ValueError(f"{name} must be {accepted}, got {shown(value)}; write for example {example}")
        if len(value) > most:
            raise ValueError(f"{name} takes at most {most} values, got {len(value)}; write for example {example}")
        return tuple(kind(f"each of {name}", item) for item in value)

    return check


def section(
    cls: type, *, none: bool = False, refuse: Callable[[str, Mapping[str, Any]], None] | None = None, example: str = ""
) -> Kind:
    """A part of the config with a settings dataclass of its own, or None where that is allowed. `refuse(name, keys)` may know
    keys by their history."""

    def check(name: str, value: Any) -> Any:
        if isinstance(value, cls) or (none and value is None):
            return value
        if not isinstance(value, Mapping):
            known = f"write for example {example}" if example else f"known keys: {', '.join(_names(cls))}"
            raise ValueError(f"{name} must be a dict{' or None' * none}, got {shown(value)}; {known}")
        if refuse is not None:
            refuse(name, value)
        return from_mapping(cls, value, name)

    return check


def as_scales(name: str, value: Any, num_windows: int | None = None) -> float | tuple[float, ...]:
    """A guidance scale >= 0, or a list of them (exactly one a window, where their number is given) as a tuple."""
    one = number(low=0, most=MOST_SCALE)
    if not is_list(value):
        return one(name, value)
    if len(value) <= MOST_WINDOWS and num_windows in (None, len(value)):
        return tuple(one(f"{name}[{i}]", scale) for i, scale in enumerate(value))
    which = f"each of the {num_windows} windows" if num_windows else f"each window, of which there are at most {MOST_WINDOWS}"
    raise ValueError(f"{name} must be one number, or one for {which}, noisiest first, got {shown(list(value[:MOST_WINDOWS]))}")


def data(name: str, value: Any, depth: int = 4) -> Any:
    """Words, numbers, switches and None, in lists and dicts of some depth: what JSON can hold, in plain Python."""
    value, real = plain(value), as_number(value)
    if value is None or isinstance(value, bool):
        return value
    if real is not None:
        return number(most=1e308)(name, real)
    if isinstance(value, str):
        return words(name, value)
    if depth and is_list(value) and len(value) <= MOST_STEPS:
        return [data(name, item, depth - 1) for item in value]
    if depth and isinstance(value, Mapping) and len(value) <= MOST_WINDOWS and all(isinstance(one, str) for one in value):
        return {str(one): data(f"{name}.{one}", item, depth - 1) for one, item in value.items()}
    raise ValueError(f"{name} must hold words, numbers, True, False and None, or lists and dicts of those, got {shown(value)}")


# --- whole sections ---


def from_mapping(cls: type, value: Mapping[str, Any], where: str) -> Any:
    """Build a settings dataclass from a config dict, refusing keys that it does not have.

    Raises:
        ValueError: unknown keys (with the closest known ones), or values that the dataclass refuses.
    """
    refuse_unknown(value, _names(cls), where)
    return cls(**value)


def refuse_unknown(keys: Iterable[Any], known: Sequence[str], where: str) -> None:
    """Raises ValueError for keys that are not among the known ones, with the closest of these."""
    unknown = [one for one in keys if not isinstance(one, str) or one not in known][:10]
    if unknown:
        close = [match for one in unknown for match in difflib.get_close_matches(shown(one).strip("'"), known, n=1)]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"unknown key(s) {', '.join(map(shown, unknown))} in {where}{hint} Known keys: {', '.join(known)}")


def check_num_steps(num_steps: int, name: str = "the number of steps") -> None:
    """Raises ValueError unless num_steps is an integer >= 1."""
    whole()(name, num_steps)


# --- values ---


def plain(value: Any) -> Any:
    """A scalar of numpy or torch (or an array without dimensions) as Python's; anything else as it is."""
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def as_number(value: Any) -> int | float | None:
    """A real number, whichever library's, as Python's; None for anything else, True and False included."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return int(value) if isinstance(value, Integral) else float(value)
    except OverflowError:  # a fraction that is too large
        return math.inf


def is_list(value: Any) -> bool:
    """Is it a list, a tuple or the like? Text and bytes are not."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


class _Shown(reprlib.Repr):
    """Values in messages, of whatever size and depth."""

    maxlevel, maxlist, maxtuple, maxdict, maxstring, maxlong, maxother = 4, 40, 40, 20, 200, 60, 200


def shown(value: Any) -> str:
    """repr, shortened where it is long; the type's name where a value has no repr."""
    try:
        return _Shown().repr(value)
    except Exception:  # whatever somebody's __repr__ raises; Python's for an integer of 5,000 digits
        return f"a value of type {type(value).__name__}"


def _names(cls: type) -> list[str]:
    return [one.name for one in fields(cls)]


# --- files ---


def read_bounded(file: str | os.PathLike, most: int = MOST_BYTES) -> bytes:
    """The start of a file, which is all of it unless `parse_json` refuses its size.

    Raises:
        OSError: it cannot be read; a folder or a pipe.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):  # a pipe would be waited for
        raise OSError("it is no file")
    with Path(file).open("rb") as opened:
        return opened.read(most + 1)


def parse_json(text: str | bytes, most: int = MOST_BYTES) -> Any:
    """JSON in UTF-8, without its extensions NaN and Infinity.

    Raises:
        ValueError: anything else, more than `most` bytes, or deep nesting.
    """
    if len(text) > most:
        raise ValueError(f"it is larger than {most} bytes")
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
