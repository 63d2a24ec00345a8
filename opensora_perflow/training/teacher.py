"""The frozen teacher: a plain copy of a network's structure, with the weights it is to teach from."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opensora_perflow.checkpoints import misfits, read_state_dict
from opensora_perflow.training.adapters import base_state, remove_adapters
from opensora_perflow.training.host import Host
from opensora_perflow.training.recipe import TeacherSettings
from opensora_perflow.training.state import find_state, raw_weights
from opensora_perflow.training.store import ChainStore

logger = logging.getLogger("opensora_perflow")

AS_BUILT = "the network as it was built"
"""Begins the source of a teacher that has the weights which its student began with."""


@dataclass(frozen=True)
class Teacher:
    """The network that teaches, and what is known of it.

    network: Frozen. source: Where its weights came from, in words. fingerprint: `fingerprint` of the run's first teacher.
    stage: Of its students; 1 where it is an original model, 2 where it is a student of stage 1, and so on.
    is_student: A curriculum's student of the stage before, which takes Euler steps and has its guidance folded in.
    """

    network: nn.Module
    source: str
    fingerprint: str
    stage: int = 1
    is_student: bool = False

    def replaced_by(self, student: nn.Module, source: str) -> Teacher:
        """The same run's next teacher: a student of the first one, frozen."""
        return replace(self, network=student, source=source, is_student=True)


def first_teacher(settings: TeacherSettings, model: nn.Module, host: Host) -> Teacher:
    """The teacher that a run begins with.

    Args:
        settings: Which weights it has.
        model: The student, wrapped or bare, whose structure is copied; with its weights where the settings name none.
        host: Tells where the student's own weights came from.

    Raises:
        ValueError: see `check_source` and `load_teacher`.
    """
    source = settings.from_pretrained
    kept = host.own_teacher(model, source)
    words, stage = origin_of(settings, host, kept is not None)
    network = load_teacher(host.settled(model), source, host.weights) if kept is None else kept
    started = host.first_weights()
    raw = None if started is None else raw_weights(started)
    if raw is not None:
        logger.warning("this run begins with a student: %s", raw)
    teacher = Teacher(network, words, fingerprint(network), stage)
    logger.info("PeRFlow teacher: %s (fingerprint %s)", teacher.source, teacher.fingerprint)
    return teacher


def stored_teacher(settings: TeacherSettings, model: nn.Module, host: Host, store: ChainStore) -> Teacher:
    """The teacher of a store's chains. Its network is not there; the student's own takes its place where one is asked.

    Raises:
        ValueError: the settings name other weights than the store's teacher had.
    """
    origin, network = store.origin, host.settled(model)
    if settings.from_pretrained is not None:
        dtypes = {name: value.dtype for name, value in base_state(network).items()}
        named = host.weights(settings.from_pretrained, network)
        found = digest({name: value.to(dtypes.get(name, value.dtype)) for name, value in named.items()})
        if found != origin.teacher:
            raise ValueError(
                f"the store {str(store.folder)!r} was solved by a teacher with the fingerprint {origin.teacher} "
                f"({origin.teacher_source}), and teacher.from_pretrained={settings.from_pretrained!r} has {found}; name the "
                "store's teacher or none, or write another store"
            )
    source = f"{len(store.chains)} stored chains in {store.folder} ({origin.teacher_source})"
    begins = "that teacher's" if fingerprint(network) == origin.teacher else "others than that teacher's"
    logger.info("PeRFlow trains from %s (fingerprint %s); the student has %s weights", source, origin.teacher, begins)
    return Teacher(network, source, origin.teacher, origin.stage)


def origin_of(settings: TeacherSettings, host: Host, kept: bool = False) -> tuple[str, int]:
    """Where the teacher's weights will come from, see `check_source`, and the stage of its students. Nothing is loaded."""
    words = check_source(settings, host, kept)
    weights = host.first_weights() if settings.from_pretrained is None else settings.from_pretrained
    taught = None if weights is None else find_state(weights)
    return words, 1 if taught is None else taught[0].stage + 1


def check_source(settings: TeacherSettings, host: Host, kept: bool = False) -> str:
    """Where the teacher's weights will come from, in words for the log. Warns where a student is expected and none is known.

    Args:
        settings, host: See `first_teacher`.
        kept: The host has a teacher apart from the student, see `Host.own_teacher`.

    Raises:
        ValueError: a resumed student would become its own teacher; or the teacher is a PeRFlow student, and the config does not
            allow one.
    """
    pretrained, resumed, source = host.first_weights(), host.resumed(), settings.from_pretrained
    if source is None and resumed is not None and not kept:
        suggestion = f'teacher=dict(from_pretrained="{pretrained or "<the checkpoint that the run started from>"}")'
        raise ValueError(
            f"this run resumes from {resumed[0]!r}, so its weights are already those of a student and must not become "
            f'its teacher; say where the teacher is: scheduler = dict(type="perflow", {suggestion}, ...)'
        )
    _check_distilled(settings, host, pretrained if source is None else source)
    if source is not None:
        return f"weights from {source}"
    if kept:
        return f"{AS_BUILT} ({'random weights' if pretrained is None else f'from {pretrained}'})"
    return "a copy of the student's weights at this run's first step" + (f" (loaded from {pretrained})" if pretrained else "")


def _check_distilled(settings: TeacherSettings, host: Host, weights: str | None) -> None:
    """Is the teacher a student, as far as anything tells, and is that meant?"""
    distilled = weights is not None and (find_state(weights) is not None or host.trained_students(weights))
    if settings.allow_distilled and not distilled:
        logger.warning(
            "teacher.allow_distilled expects a PeRFlow student, but nothing says that %s one: no perflow.json lies beside "
            "them. A later stage starts from the checkpoint of the one before: --ckpt-path, or teacher.from_pretrained",
            "this run's first weights are" if weights is None else f"the weights {str(weights)!r} are",
        )
    if distilled and not settings.allow_distilled:
        raise ValueError(
            f"the teacher's weights {str(weights)!r} were written by a PeRFlow run: they are a student's; name the original "
            "model in teacher=dict(from_pretrained=...), or accept the student as teacher of a later stage with "
            "teacher=dict(..., allow_distilled=True)"
        )


def copy_frozen(network: nn.Module, share_untrained: bool = False) -> nn.Module:
    """Copy a network so that nothing can train it and nothing of the original's training set-up is left on it.

    Parameters become plain `nn.Parameter`s: boosters put subclasses on them whose in-place arithmetic does nothing
    (colossalai's ColoTensor), and buffers may be non-leaf tensors, which deepcopy refuses. The copy is in eval mode, needs no
    gradients and has gradient checkpointing off. Copying the structure, not calling a factory, works for every network.
    What torch.compile wrapped, the whole or a part, is copied uncompiled. Keys are those of the network, and the copy uses
    nothing that was compiled for training.
    `share_untrained`: Parameters that the original does not train are the copy's too, and cost no memory.
    """
    memo: dict[int, object] = {}
    originals = []  # deepcopy finds copies by id(), so the originals have to stay alive until it is done
    for parameter in network.parameters():
        shared = share_untrained and not parameter.requires_grad
        memo[id(parameter)] = parameter if shared else nn.Parameter(_plain(parameter), requires_grad=False)
        originals.append(parameter)
    for buffer in network.buffers():
        memo[id(buffer)] = _plain(buffer)
        originals.append(buffer)
    for module in reversed(list(network.modules())):  # parts before what holds them
        if (bare := module._modules.get("_orig_mod")) is not None:
            memo[id(module)] = deepcopy(bare, memo)
    own = vars(network).pop("__deepcopy__", None)  # what the network makes of being copied by its host
    try:
        copy = deepcopy(network, memo)
    finally:
        if own is not None:
            network.__deepcopy__ = own
    for module in copy.modules():
        if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            del module.forward  # a function is not copied: it would run the original
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = False
    return copy.eval().requires_grad_(False)


def load_teacher(
    network: nn.Module,
    source: str | os.PathLike | None,
    weights: Callable[[str | os.PathLike, nn.Module], Mapping[str, Tensor]] | None = None,
) -> nn.Module:
    """A frozen copy of `network` that holds the weights of `source` (None: those that `network` has now).

    Args:
        weights: Reads them, see host.Host.weights; None: as they are.

    Raises:
        ValueError: no checkpoint there, or it does not fit the network (the message names the first mismatches).
    """
    teacher = copy_frozen(network)
    if source is not None:
        remove_adapters(teacher)
        state = read_state_dict(source) if weights is None else weights(source, teacher)
        check_fits(state, teacher, str(source))
        teacher.load_state_dict(state)
    return teacher


def fingerprint(network: nn.Module) -> str:
    """Identity of a network's weights: 16 hex digits of a SHA-256.

    It takes in names, shapes, dtypes and up to 8192 evenly spaced values of each tensor. That is enough to tell teachers apart:
    training moves nearly every value of a tensor. A network of a billion parameters takes a fraction of a second. Rounded to
    another dtype the same weights are another teacher. Adapters do not count.
    """
    return digest(base_state(network))


def digest(state: Mapping[str, Tensor]) -> str:
    """As `fingerprint`, of a state dict."""
    hashed = hashlib.sha256()
    for name, value in sorted(state.items()):
        values = _plain(value).reshape(-1)[:: max(1, value.numel() // 4096)].contiguous().cpu()
        hashed.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        hashed.update(values.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def check_fits(state: Mapping[str, Tensor], network: nn.Module, source: str) -> None:
    """Raises ValueError unless the state dict has exactly the network's keys and shapes."""
    problems = misfits(state, network, "the student")
    if problems is not None:
        raise ValueError(
            f"the teacher's weights in {source!r} do not fit the student: {problems}. Teacher and student must be the same "
            "network; give the student the teacher's model settings"
        )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor).clone()
