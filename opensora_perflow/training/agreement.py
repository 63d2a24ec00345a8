"""Do all processes of a run train the same student? Nothing else would tell: gradients are averaged whatever made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from opensora_perflow.training.host import Host
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.state import StudentState

PLACES = ("from_pretrained", "stored")
"""Keys of the teacher that may be a process's own."""


def settings_of(recipe: Recipe, state: StudentState, host_keys: Mapping[str, Any]) -> dict[str, str]:
    """Name -> value in words of all that has to be the same in every process, the teacher's fingerprint included.

    Not the seed and the teacher's places: all may be a process's own.
    """
    values = {**host_keys, **asdict(recipe), **asdict(state)}
    values["teacher settings"] = {name: value for name, value in asdict(recipe.teacher).items() if name not in PLACES}
    values["draws"] = {name: value for name, value in asdict(recipe.draws).items() if name != "seed"}
    values["curriculum"] = [asdict(recipe)["curriculum"], state.curriculum]
    values["teacher"] = f"fingerprint {state.teacher}"
    del values["teacher_source"]
    return {name: json.dumps(value, default=lambda other: type(other).__name__) for name, value in values.items()}


def check_agreement(settings: Mapping[str, str], host: Host) -> int:
    """Compare `settings_of` this process with those of all others, each of which has to call.

    Returns:
        How many data-parallel shares the samples are split into.

    Raises:
        ValueError: they differ; the message names the settings, two processes, and what each has. The same in all processes.
    """
    everyone = host.gathered((host.rank(), dict(settings)))
    _, first = everyone[0]
    for process, (_, other) in enumerate(everyone):
        different = [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
        if different:
            listed = "; ".join(f"{name} is {first.get(name)} there and {other.get(name)} here" for name in different)
            raise ValueError(
                f"the processes of this run would train one student with different settings, process 0 (there) and process "
                f"{process} (here): {listed}. Start all of them with the same config and the same weights"
            )
    return len({rank for rank, _ in everyone})
