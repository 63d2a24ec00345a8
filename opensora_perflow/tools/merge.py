"""`opensora-perflow merge`: adapters and their base as one network, in a folder that every loader of the base takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.hosts.v1.lora import LoRA, check_origin
from opensora_perflow.hosts.v1.weights import read_source
from opensora_perflow.hosts.v2.lora import FOLDER, lora_folder, weights_in, with_lora
from opensora_perflow.tools.export import student
from opensora_perflow.tools.layouts import check_free, write_weights
from opensora_perflow.training.adapters import DOWN, is_added, merged
from opensora_perflow.training.delta_file import DTYPES, is_delta
from opensora_perflow.training.state import StudentState, averages_beside, find_state
from opensora_perflow.training.teacher import AS_BUILT, digest


def merge(checkpoint: Path, out: Path, base: str, ema: bool = True) -> None:
    """Write adapters and their base to OUT, see layouts.LAYOUTS. OUT appears as a whole, or not at all.

    Args:
        checkpoint: A checkpoint folder of a training with model=dict(type="perflow_lora"), or a file of adapters in it; or of
            Open-Sora 2.0 a checkpoint with lora/ in it, an export of one, or that folder itself.
        out: What does not exist yet: a folder, or a file of one of layouts.FILES.
        base: The weights that the training started from, in any form that a teacher's may have. Dtypes stay theirs.
        ema: Whether a folder's averaged adapters are merged, or those of its last step. In 2.0 the latter where there is no
            average, as in an export.

    Raises:
        ValueError: no adapters there, another base than theirs, or OUT exists. OSError: OUT cannot be written.
    """
    found = find_state(checkpoint)
    check_free(out, found and replace(found[0], adapters=None))
    if lora_folder(checkpoint) is not None:
        write_weights(out, *lora_network(str(checkpoint), base, read_whole(base), ema))
        return
    adapts = found is not None and found[0].adapters is not None
    added = (student(checkpoint, ema)[0] if checkpoint.is_dir() else read_source(checkpoint)) if adapts else {}
    if not added or not all(is_added(name) for name in added):
        raise ValueError(
            f"{checkpoint} is no checkpoint of adapters with its perflow.json, as a training with "
            'model=dict(type="perflow_lora") writes them; a whole network needs no merging'
        )
    write_weights(out, *whole_network(checkpoint, added, base, read_whole(base)))


def read_whole(source: str) -> dict[str, Tensor]:
    """The weights of a whole network, as a teacher's may be named.

    Raises:
        ValueError: see `check_whole` and `read_source`.
    """
    if lora_folder(source) is not None:
        raise _adapters_alone(source)
    return check_whole(read_source(source), source)


def check_whole(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Raises ValueError where tensors of a source are a delta, adapters alone, or not finite; returns them."""
    if is_delta(state):
        raise ValueError(
            f"{source!r} is a delta, and the weights of a whole network are wanted here; name those, or add the delta to its "
            "base first: opensora-perflow delta merge DELTA BASE OUT"
        )
    if any(is_added(name) for name in state):
        raise _adapters_alone(source)
    broken = next((name for name, value in state.items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise ValueError(f"{broken} in {source!r} holds NaN or infinity, from damage or a training that diverged")
    return state


def _adapters_alone(source: str) -> ValueError:
    return ValueError(
        f"{source!r} holds adapters (LoRA) alone, and a whole network is wanted here; merge them into their base first: "
        "opensora-perflow merge CHECKPOINT OUT --base WEIGHTS"
    )


def whole_network(
    checkpoint: str | Path, added: dict[str, Tensor], base: str, weights: dict[str, Tensor], dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], StudentState]:
    """A network with its adapters in it, and what is known of the student.

    Args:
        checkpoint, base: Where the adapters `added` and the `weights` that they add to came from.
        dtype: Of the sum; None: the base's.

    Raises:
        ValueError: nothing tells how the adapters were trained, or they were trained on another base.
    """
    found = find_state(checkpoint)
    if found is None or found[0].adapters is None:
        raise ValueError(
            f"{checkpoint} is no checkpoint of adapters with its perflow.json, as a training with "
            'model=dict(type="perflow_lora") writes them; put the perflow.json of the training beside them'
        )
    state = found[0]
    scale = LoRA(**{name: state.adapters[name] for name in ("rank", "alpha", "targets")}).scale
    wide = weights if dtype is None else {name: value.to(dtype) for name, value in weights.items()}
    network = merged(wide, added, scale)
    names = [f"{name.removesuffix(DOWN)}.weight" for name in added if name.endswith(DOWN)]
    check_origin(state, {name: weights[name] for name in names}, str(checkpoint), base)
    return network, replace(state, adapters=None)


def lora_network(
    source: str, base: str, weights: dict[str, Tensor], ema: bool = True, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], StudentState]:
    """A network with Open-Sora 2.0's adapters in it, and what is known of the student; see `merge` and `whole_network`.

    Args:
        source: Of which lora_folder finds adapters.

    Raises:
        ValueError: no perflow.json is there, or the adapters were trained on another base. Nobody noted the base where another
            network taught, or where the training's network had weights that the base's file has not.
    """
    folder = lora_folder(source)
    found = find_state(folder)
    if found is None:
        raise ValueError(f"{source} has no perflow.json; put the one of the training beside its folder lora/")
    state, checkpoint = found[0], folder.parent if folder.name == FOLDER else folder
    added = student(checkpoint, True)[0] if ema and averages_beside(checkpoint) else read_state_dict(weights_in(folder))
    wide = weights if dtype is None else {name: value.to(dtype) for name, value in weights.items()}
    network = with_lora(wide, added, folder)
    known = (state.teacher_source or "").startswith(AS_BUILT) and state.guidance.get("mode") != "range"
    if known and "cond_in.weight" in weights:
        bases = (digest({name: value.to(other) for name, value in weights.items()}) for other in DTYPES.values())
        if state.teacher not in bases:
            raise ValueError(
                f"the adapters in {source!r} were trained on another base than {base!r}; name the weights that their training "
                f"started from ({state.teacher_source})"
            )
    return network, state
