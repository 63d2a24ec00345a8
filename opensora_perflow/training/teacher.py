"""The frozen teacher: a plain copy of a network's structure, with the weights it is to teach from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from opensora_perflow.checkpoints import read_state_dict


def copy_frozen(network: nn.Module) -> nn.Module:
    """Copy a network so that nothing can train it and nothing of the original's training set-up is left on it.

    Parameters become plain `nn.Parameter`s: boosters put subclasses on them whose in-place arithmetic does nothing
    (colossalai's ColoTensor), and buffers may be non-leaf tensors, which deepcopy refuses. The copy is in eval mode, needs no
    gradients and has gradient checkpointing off. Copying the structure, not calling a factory, works for every network.
    """
    memo: dict[int, object] = {}
    originals = []  # deepcopy finds copies by id(), so the originals have to stay alive until it is done
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(_plain(parameter), requires_grad=False)
        originals.append(parameter)
    for buffer in network.buffers():
        memo[id(buffer)] = _plain(buffer)
        originals.append(buffer)
    copy = deepcopy(network, memo)
    for module in copy.modules():
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = False
    return copy.eval().requires_grad_(False)


def load_teacher(network: nn.Module, source: str | os.PathLike | None) -> nn.Module:
    """A frozen copy of `network` that holds the weights of `source` (None: those that `network` has now).

    Raises:
        ValueError: no checkpoint there, or it does not fit the network (the message names the first mismatches).
    """
    state = None if source is None else read_state_dict(source)
    if state is not None:
        check_fits(state, network, str(source))
    teacher = copy_frozen(network)
    if state is not None:
        teacher.load_state_dict(state)
    return teacher


def fingerprint(network: nn.Module) -> str:
    """Identity of a network's weights: 16 hex digits of a SHA-256.

    It takes in names, shapes, dtypes and up to 8192 evenly spaced values of each tensor. That is enough to tell teachers apart,
    because training moves nearly every value of a tensor, and a network of a billion parameters takes a fraction of a second.
    Rounded to another dtype the same weights are another teacher.
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        values = _plain(value).reshape(-1)[:: max(1, value.numel() // 4096)].contiguous().cpu()
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_fits(state: Mapping[str, Tensor], network: nn.Module, source: str) -> None:
    """Raises ValueError unless the state dict has exactly the network's keys and shapes."""
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{key} is not in the student" for key in found if key not in expected]
    problems += [
        f"{key} is {list(found[key])}, the student's is {list(expected[key])}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(
            f"the teacher's weights in {source!r} do not fit the student: {shown}. Teacher and student must be the same "
            "network; give the student the teacher's model settings"
        )


def check_finite(x_win_end: Tensor, t_start: Tensor, t_end: Tensor, source: str) -> None:
    """Raises ValueError naming the windows in which the teacher's solution is not finite."""
    if torch.isfinite(x_win_end).all():
        return
    bad = ~torch.isfinite(x_win_end).flatten(1).all(dim=1)
    windows = sorted({(round(a, 4), round(b, 4)) for a, b in zip(t_start[bad].tolist(), t_end[bad].tolist())}, reverse=True)
    raise ValueError(
        f"the teacher ({source}) returned NaN or infinity for {int(bad.sum())} of {len(bad)} samples, in the windows "
        + ", ".join(f"t {a} -> {b}" for a, b in windows)
        + "; check its weights (teacher.from_pretrained), the latents' scale, and use dtype bf16 instead of fp16"
    )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor).clone()
