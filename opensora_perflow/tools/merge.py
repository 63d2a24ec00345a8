"""`opensora-perflow merge`: adapters and their base as one network, in a folder that every loader of the base takes."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.v1.lora import LoRA, check_origin
from opensora_perflow.hosts.v1.weights import read_source
from opensora_perflow.training.adapters import DOWN, is_added, merged
from opensora_perflow.training.state import METADATA_KEY, find_state, write_state


def merge(checkpoint: Path, out: Path, base: str) -> None:
    """Write OUT/model/model.safetensors and OUT/perflow.json. OUT appears as a whole, or not at all.

    Args:
        checkpoint: A checkpoint folder of a training with model=dict(type="perflow_lora"), or the ema.pt in it.
        out: A folder that does not exist yet.
        base: The weights that the training started from, in any form that a teacher's may have. Dtypes stay theirs.

    Raises:
        ValueError: no adapters there, another base than theirs, or OUT exists. OSError: OUT cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name a folder that does not")
    found = find_state(checkpoint)
    added = read_source(checkpoint)
    if found is None or found[0].adapters is None or not all(is_added(name) for name in added):
        raise ValueError(
            f"{checkpoint} is no checkpoint of adapters with its perflow.json, as a training with "
            'model=dict(type="perflow_lora") writes them; a whole network needs no merging'
        )
    state, weights = found[0], read_source(base)
    network = merged(weights, added, LoRA(**{name: state.adapters[name] for name in ("rank", "alpha", "targets")}).scale)
    names = [f"{name.removesuffix(DOWN)}.weight" for name in added if name.endswith(DOWN)]
    check_origin(state, {name: weights[name] for name in names}, str(checkpoint), base)
    whole = replace(state, adapters=None)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        (temporary / "model").mkdir()
        write_state_dict(temporary / "model" / "model.safetensors", network, {"format": "pt", METADATA_KEY: whole.to_json()})
        write_state(temporary, whole)
        temporary.chmod(0o755)  # mkdtemp's is its owner's alone
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
