"""`opensora-perflow merge`: adapters and their base as one network, in a folder that every loader of the base takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from opensora_perflow.hosts.v1.lora import LoRA, check_origin
from opensora_perflow.hosts.v1.weights import read_source
from opensora_perflow.tools.export import new_folder, refuse_existing, student, write_network
from opensora_perflow.training.adapters import DOWN, is_added, merged
from opensora_perflow.training.state import find_state


def merge(checkpoint: Path, out: Path, base: str, ema: bool = True) -> None:
    """Write OUT/model/model.safetensors and OUT/perflow.json. OUT appears as a whole, or not at all.

    Args:
        checkpoint: A checkpoint folder of a training with model=dict(type="perflow_lora"), or a file of adapters in it.
        out: A folder that does not exist yet.
        base: The weights that the training started from, in any form that a teacher's may have. Dtypes stay theirs.
        ema: Whether a folder's averaged adapters are merged, or those of its last step.

    Raises:
        ValueError: no adapters there, another base than theirs, or OUT exists. OSError: OUT cannot be written.
    """
    refuse_existing(out)
    found = find_state(checkpoint)
    adapts = found is not None and found[0].adapters is not None
    added = (student(checkpoint, ema)[0] if checkpoint.is_dir() else read_source(checkpoint)) if adapts else {}
    if not added or not all(is_added(name) for name in added):
        raise ValueError(
            f"{checkpoint} is no checkpoint of adapters with its perflow.json, as a training with "
            'model=dict(type="perflow_lora") writes them; a whole network needs no merging'
        )
    state = found[0]
    weights = read_source(base)
    network = merged(weights, added, LoRA(**{name: state.adapters[name] for name in ("rank", "alpha", "targets")}).scale)
    names = [f"{name.removesuffix(DOWN)}.weight" for name in added if name.endswith(DOWN)]
    check_origin(state, {name: weights[name] for name in names}, str(checkpoint), base)
    with new_folder(out) as folder:
        write_network(folder, network, replace(state, adapters=None))
