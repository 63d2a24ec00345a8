"""The demo's teacher and student under each host: what trains and samples them, called as Open-Sora's scripts call it."""

from __future__ import annotations

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow import portable
from opensora_perflow.checkpoints import read_metadata, read_state_dict
from opensora_perflow.hosts.v1.host import OpenSora
from opensora_perflow.hosts.v2.flux import hooks_of
from opensora_perflow.hosts.v2.tokens import Layout
from opensora_perflow.planning.probe import Probe
from opensora_perflow.registry import SCHEDULERS, build_module
from opensora_perflow.tools import compare
from opensora_perflow.tools.open_sora_2 import STEPS_KEY, Scripts
from opensora_perflow.tools.probes import guided_field, sizes
from opensora_perflow.training.state import StudentState
from opensora_perflow.worlds.codec import clip_latents
from opensora_perflow.worlds.model import WEIGHTS, TinySTDiT, load_teacher
from opensora_perflow.worlds.text import TinyTextEncoder

logger = logging.getLogger("opensora_perflow")

TEACHER_FILE = "mmdit_teacher.safetensors"
"""Of Open-Sora 2.0's teacher, in the demo's folder."""
TEACHER_CLIPS = 768
"""Clips that it is trained on."""
TEACHER_LR = 5e-3
"""Its peak learning rate: after 1,000 steps 72 % of its samples show what their prompts say, with 2e-3 59 %, with 1e-2 69 %."""


class DemoModel(ABC):
    """A guided teacher, and the student that is made of it.

    Args:
        scale: Of the guidance.
        seed: Of the student's draws.

    Attributes:
        teacher: In eval mode; once `make_teacher` has run.
        windows: The student's edges, in untransformed time.
    """

    teacher: nn.Module
    windows: tuple[float, ...]

    def needs_teacher(self, folder: Path, steps: int) -> bool:
        """Is there no teacher yet that was trained for as many steps, in the package or in a demo's folder?"""
        return False

    def make_teacher(self, folder: Path, steps: int) -> None:
        """Train one, where it is needed, and keep it in the folder."""
        return None

    @abstractmethod
    def student(self) -> nn.Module:
        """The network that begins as the teacher."""

    @abstractmethod
    def loss(self, student: nn.Module, data: Tensor, captions: Sequence[str]) -> Tensor:
        """Of a training step, a scalar, for clean latents [B, C, T, H, W] and their texts."""

    @abstractmethod
    def sample(self, network: nn.Module, batch: compare.Batch, steps: int) -> compare.Sampled:
        """By the host's sampler for the teacher, by the student's for others."""

    @abstractmethod
    def probe(self, network: nn.Module, noise: Tensor, prompts: Sequence[str], scale: float) -> Probe:
        """The network as a field, guided by a scale; 1 = none."""

    @abstractmethod
    def record_in(self, folder: Path) -> None:
        """Have the training write its record there."""

    @abstractmethod
    def state(self) -> StudentState:
        """What belongs to the student's weights; once it was trained."""


class STDiT3Model(DemoModel):
    """The shipped teacher: in the package's copy of STDiT3, or in the class of a checkout of Open-Sora 1.2 or 1.3."""

    windows = compare.WINDOWS

    def __init__(self, open_sora: Path | None, scale: float, seed: int) -> None:
        self._open_sora, self._scale = open_sora, scale
        self.teacher, self._text = build_network(open_sora), TinyTextEncoder()
        self._text.y_embedder = self.teacher.y_embedder
        guidance = dict(mode="fixed", scale=scale)
        config = dict(type="perflow", windows=self.windows, guidance=guidance, draws=dict(seed=seed))
        self._scheduler = build_module(config, SCHEDULERS)

    def student(self) -> nn.Module:
        return build_network(self._open_sora)

    def loss(self, student: nn.Module, data: Tensor, captions: Sequence[str]) -> Tensor:
        model_args = {**self._text.encode(list(captions)), **sizes(len(data))}
        return self._scheduler.training_losses(student, data, model_args)["loss"].mean()

    def sample(self, network: nn.Module, batch: compare.Batch, steps: int) -> compare.Sampled:
        scheduler = compare.teacher_sampler(steps, self._scale) if network is self.teacher else self._scheduler
        return compare.sample(scheduler, network, self._text, batch, progress=steps > 4)

    def record_in(self, folder: Path) -> None:
        self._scheduler.host = _Host(folder)

    def probe(self, network: nn.Module, noise: Tensor, prompts: Sequence[str], scale: float) -> Probe:
        return Probe(guided_field(network, self._text, prompts, sizes(len(noise)), scale), noise)

    def state(self) -> StudentState:
        return self._scheduler.state()


class MMDiTModel(DemoModel):
    """A teacher of Open-Sora 2.0's class, trained here, and its student by perflow_flux.

    Training and sampling are the expressions of train.py and inference.py, see open_sora_2.Scripts.
    """

    windows = (1.0, 0.75, 0.5, 0.25, 0.0)

    def __init__(self, root: Path, scale: float, seed: int) -> None:
        self._host, self._scale = Scripts(root), scale
        self._perflow = {"windows": 4, "guidance": {"mode": "fixed", "scale": scale}, "draws": {"seed": seed}}
        # Networks without hooks, the teacher's, keep the number of steps that they are sampled with.
        self._perflow["t2i_steps"] = None
        self.teacher, self._weights = self._host.network(None).eval(), root
        self._student: nn.Module | None = None

    def needs_teacher(self, folder: Path, steps: int) -> bool:
        """Raises ValueError where another file has its name."""
        file = folder / TEACHER_FILE
        if not file.is_file():
            return True
        found = read_metadata(file).get(STEPS_KEY, "")
        if not found.isdecimal():
            raise ValueError(f"{file} is no teacher that a demo trained; move it away, or choose another --out")
        return int(found) < steps

    def make_teacher(self, folder: Path, steps: int) -> None:
        self._weights = folder / TEACHER_FILE
        if self.needs_teacher(folder, steps):
            data, captions = clip_latents(TEACHER_CLIPS, progress=True)
            with torch.random.fork_rng(devices=[]):
                self._host.train_teacher(data, captions, self._weights, steps=steps, lr=TEACHER_LR)
            logger.info("the teacher is kept in %s for the next demo in this folder", self._weights)
        else:
            logger.info(
                "the teacher of %s steps is from an earlier demo: %s", read_metadata(self._weights)[STEPS_KEY], self._weights
            )
        self.teacher = self._host.network(self._weights).eval()

    def student(self) -> nn.Module:
        self._student = self._host.network(self._weights, self._perflow)
        return self._student

    def loss(self, student: nn.Module, data: Tensor, captions: Sequence[str]) -> Tensor:
        return self._host.loss(student, data, captions, drop=False)

    def sample(self, network: nn.Module, batch: compare.Batch, steps: int) -> compare.Sampled:
        asked, start, count = [], time.process_time(), len(batch.noise)

        def note(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            layout = Layout.of(inputs["img_ids"], module.patch_size)
            asked.append((len(inputs["img"]), layout.unpack(inputs["img"][:count])))

        handle = network.register_forward_pre_hook(note, with_kwargs=True)
        try:
            latents = self._host.sample(network, batch.noise, batch.prompts, steps, self._scale)
        finally:
            handle.remove()
        states = torch.stack([x for _, x in asked])
        return compare.Sampled(latents, states, sum(rows for rows, _ in asked) // count, time.process_time() - start)

    def record_in(self, folder: Path) -> None:
        hooks, _ = hooks_of(self._student)
        hooks.host.folder = lambda: folder

    def probe(self, network: nn.Module, noise: Tensor, prompts: Sequence[str], scale: float) -> Probe:
        return self._host.probe(network, noise, prompts, scale)

    def state(self) -> StudentState:
        hooks, _ = hooks_of(self._student)
        return hooks.state()


class _Host(OpenSora):
    """No script of Open-Sora: the run writes its record into the demo's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder(self) -> Path:
        return self._folder


def has_mmdit(open_sora: Path | None) -> bool:
    """Is this a checkout of Open-Sora 2.0?"""
    return open_sora is not None and (Path(open_sora) / "opensora" / "models" / "mmdit" / "model.py").is_file()


def build_model(open_sora: Path | None, scale: float, seed: int) -> DemoModel:
    """The demo's model, of a checkout's own class where one is named.

    Raises:
        ValueError: no checkout of Open-Sora 1.2, 1.3 or 2.0, or its packages are not installed.
    """
    try:
        if has_mmdit(open_sora):
            return MMDiTModel(Path(open_sora).resolve(), scale, seed)
        return STDiT3Model(open_sora, scale, seed)
    except ImportError as error:
        raise ValueError(
            f"--open-sora {open_sora}: its modules cannot be imported here ({error.__cause__ or error}); start the demo in the "
            "environment of that version, see docs/hosts.md"
        ) from error


def build_network(open_sora: Path | None) -> nn.Module:
    """A network with the shipped weights: the small copy of STDiT3, or the real class from a checkout."""
    if open_sora is None:
        return load_teacher()
    root = Path(open_sora).resolve()
    if not (root / "opensora" / "models" / "stdit" / "stdit3.py").is_file():
        raise ValueError(f"--open-sora must be the root of an Open-Sora v1.2.0, v1.3 or 2.0 checkout, got {str(root)!r}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    portable.activate()
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    network = STDiT3(STDiT3Config(**TinySTDiT().config)).eval()
    missing, unexpected = network.load_state_dict(read_state_dict(WEIGHTS), strict=False)
    # v1.3 adds embedders of reference frames, zero until they are trained.
    if unexpected or any(not key.startswith("x_embedder_cond") for key in missing):
        raise ValueError(f"the shipped weights do not fit {root}'s STDiT3: missing {missing[:3]}, unknown {unexpected[:3]}")
    return network
