"""Options that were measured and left: what each was, why it left, and what does its work now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from opensora_perflow.checks import Kind, choice

REMOVED_KEYS = {
    "window_time": "edges always pass through the host's timestep transform; no benchmark had a row for the other way",
    "variance_weight": "the weight is 1, and no other one was ever measured; learn_sigma=False turns the term off",
    "frames_of_weight_one": "it had no row in the benchmarks; weigh images and videos by the shares of bucket_config",
    "edit_join": "edited frames join at their own time; on the next grid time a ratio of .6 acted as .5 at 4 steps",
    "teacher.takes_scale": "no stage needs a teacher that is told its scale; distil from the original model",
    "draws.student_share": "half of each start was a tie with student starts (errors .0758 and .0753); use draws.starts",
    "draws.distribution": "beta (5, 1) was a tie on the mixture and worse on video (errors .529 against .499); use edge_mass",
    "draws.beta": "beta (5, 1) was a tie on the mixture and worse on video (errors .529 against .499); use edge_mass",
    "draws.windows": "each window is drawn equally often, since each is one step of the sampler; leave the key out, or give "
    "draws.shares",
    "curriculum.advance.every": "only one value was measured, which is used now (25 steps); leave the key out",
    "curriculum.advance.patience": "only one value was measured, which is used now (2 measurements); leave the key out",
    "curriculum.advance.min_improvement": "only one value was measured, which is used now (0.05); leave the key out",
    "curriculum.advance.batches": "only one value was measured, which is used now (1 batch); leave the key out",
}
"""Dotted key -> why it left, and what does its work now."""

REMOVED_VALUES = {
    ("draws.starts", "mixed"): 'it was a tie with student starts (errors .0758 and .0753); use "student" or "diffused"',
    (
        "teacher.solver",
        "heun",
    ): 'two Heun steps were worse than two midpoint steps on video (.585 against .499); use "midpoint"',
    (
        "objective",
        "perflow_continuity",
    ): "windows that overlap do its work, with .0845 against .0897 at 5 steps; use draws=dict(overlap=0.75, grids=[5])",
    (
        "objective",
        "perflow_huber",
    ): 'it was a tie in error on both worlds and had the wider energy distance on the mixture (.21 against .12); use "perflow"',
    (
        "watch.policy",
        "lower_lr",
    ): "a run whose rate rose a hundredfold ended at 1.64 and 1.94 of the healthy error, as with a warning (1.58, 1.95); use "
    '"rollback" (1.00, 1.01)',
    ("objective", "perflow_motion"): 'students kept 101 % and 97 % of the motion with it and without it; use "perflow"',
}
"""(Dotted key, value) -> the same for one value of a key that stays."""


def refuse_removed_keys(section: str, keys: Iterable[object]) -> None:
    """Raises ValueError where a section of the config names a key that was removed."""
    for key in keys:
        dotted = f"{section}.{key}" if section in ("teacher", "draws", "curriculum.advance") else str(key)
        if dotted in REMOVED_KEYS:
            raise ValueError(f"{dotted} was an option and is none any more: {REMOVED_KEYS[dotted]}")


def refuse_removed_value(key: str, value: object) -> None:
    """Raises ValueError for a value of a key that was removed."""
    if isinstance(value, str) and (key, value) in REMOVED_VALUES:
        raise ValueError(f"{key}={value!r} was an option and is none any more: {REMOVED_VALUES[key, value]}")


def kept(*choices: str) -> Kind:
    """One of a few words, of which others were removed."""

    def check(name: str, value: Any) -> str:
        refuse_removed_value(name, value)
        return choice(*choices)(name, value)

    return check
