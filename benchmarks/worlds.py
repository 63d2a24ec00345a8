"""The small worlds of the benchmarks, behind one interface: a guided teacher, students of it, data and prompts.

mixture  16 dimensions, 24 modes, closed-form teacher (opensora_perflow/worlds/mixture.py), MLP students of any width
forty, rings, ar1  further closed-form teachers (modes.py), MLP students alike
video    moving shapes, the demo's tiny text-to-video teacher (opensora_perflow/worlds/), students that start as its copy
stdit3   the same weights in Open-Sora's own STDiT3 class, hidden size 96; needs an Open-Sora checkout
mmdit    the same clips, the MMDiT class and the sampler of Open-Sora 2.0, and a teacher that is trained here at first; needs a
         checkout of 2.0
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from modes import Modes, ModesNetwork, ar1, forty, rings
from torch import Tensor, nn

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.hosts.chains import CHAIN, Part
from opensora_perflow.hosts.install import find_tag
from opensora_perflow.method.metrics import temporal_difference_energy
from opensora_perflow.tools.compare import reference_times
from opensora_perflow.tools.demo_models import build_network
from opensora_perflow.tools.open_sora_2 import GUIDANCE, Scripts
from opensora_perflow.tools.report import as_described
from opensora_perflow.training.plan_file import windows_of
from opensora_perflow.training.store import ChainWriter
from opensora_perflow.worlds.clips import FPS, HEIGHT, NUM_FRAMES, WIDTH, contents
from opensora_perflow.worlds.codec import TinyVAE, clip_latents
from opensora_perflow.worlds.mixture import DIM, NUM_CLASSES, ClassText, Mixture, MixtureNetwork
from opensora_perflow.worlds.text import TinyTextEncoder

AT_ONCE = 16
"""Chains of world mmdit that are solved together, and written as a shard."""
Batches = Callable[[int, torch.Generator], tuple[Tensor, dict[str, Any]]]
"""See World.batch."""
TEACHER_STEPS = 6000
"""Of the teacher of world mmdit: about 8 CPU minutes."""


class World(ABC):
    """Everything that a comparison of samplers needs to know of a model and its data."""

    name: str
    guidance: float
    """Scale of the teacher's guidance."""
    latent_shape: tuple[int, ...]
    prompts: list[str]
    teacher: nn.Module
    text: Any
    device: torch.device

    @abstractmethod
    def student(self, width: int | None) -> nn.Module:
        """A new student that starts as the teacher, in train mode, drawn from torch's global generator."""

    @abstractmethod
    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        """Clean latents and model_args of one training step."""

    def stored(self, config: Mapping[str, Any], folder: Path, count: int, seed: int, further: int) -> Batches:
        """Solve chains, each with so many further solutions of the first window, and write a store of them.

        Returns:
            As `batch`, of the store's chains: each once in a pass.
        """
        raise ValueError(f"stores of world {self.name!r} are benchmarks/stored.py's")

    def learner(self, width: int | None, config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
        """A student, and what distils and samples it: the PeRFlow object with these keys, or what answers as that does."""
        return self.student(width), self.scheduler(config)

    def scheduler(self, config: Mapping[str, Any]) -> Any:
        """What samples networks by these keys."""
        return build_module(dict(type="perflow", **config), SCHEDULERS)

    @property
    def counted(self) -> type[nn.Module]:
        """The class whose calls are a network's evaluations."""
        return type(self.teacher)

    def sizes(self, count: int) -> dict[str, Tensor]:
        """What Open-Sora's scripts send along with the prompts."""
        return {}

    @abstractmethod
    def describe(self, x: Tensor, endpoints: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """This world's own column of the table, and what else it can say."""

    own_column: str
    """Key of `describe`."""
    reference_times: Sequence[float] | None = None
    """Of the midpoint steps to the endpoints; None: as many Euler steps as few_step.py says."""
    host_sampler = "host's rflow"
    """Name of the teacher's sampler in tables."""
    teacher_steps: tuple[int, ...] = (4, 8, 16, 30)
    """Of that sampler."""


class MixtureWorld(World):
    name, guidance, own_column = "mixture", 2.0, "same_mode"
    latent_shape = (DIM, 1, 1, 1)

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.mixture = Mixture.standard()
        self.prompts = [f"class {k}" for k in range(NUM_CLASSES)]
        self.text = ClassText(device)
        self.teacher = MixtureNetwork(self.mixture, width=1).eval().to(device)  # untrained, the MLP adds nothing at any width

    def student(self, width: int | None) -> nn.Module:
        return MixtureNetwork(self.mixture, width or 256).train().to(self.device)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        class_idx = torch.randint(NUM_CLASSES, (size,), generator=generator)
        data = self.mixture.draw(class_idx, generator)
        return data.to(self.device), self.text.of(class_idx)

    def describe(self, x: Tensor, endpoints: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        nearest, also = (torch.cdist(latents.cpu().flatten(1), self.mixture.means).argmin(dim=1) for latents in (x, endpoints))
        return {"same_mode": (nearest == also).double().mean().item()}


class ModesWorld(World):
    """A world of modes.py. Guidance 1.5: with 2 the rings' teacher leaves its rings."""

    guidance, own_column = 1.5, "same_mode"

    def __init__(self, name: str, modes: Modes, device: str = "cpu") -> None:
        self.name, self.modes, self.device = name, modes, torch.device(device)
        self.latent_shape = modes.shape
        self.prompts = [f"class {k}" for k in range(NUM_CLASSES)]
        self.text = ClassText(device)
        self.teacher = ModesNetwork(modes, width=1).eval().to(device)

    def student(self, width: int | None) -> nn.Module:
        return ModesNetwork(self.modes, width or 256).train().to(self.device)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        class_idx = torch.randint(NUM_CLASSES, (size,), generator=generator)
        return self.modes.draw(class_idx, generator).to(self.device), self.text.of(class_idx)

    def describe(self, x: Tensor, endpoints: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        nearest, also = (torch.cdist(latents.cpu().flatten(1), self.modes.means).argmin(dim=1) for latents in (x, endpoints))
        return {"same_mode": (nearest == also).double().mean().item()}


MODES = {"forty": forty, "rings": rings, "ar1": ar1}


class VideoWorld(World):
    """Args: open_sora: checkout whose STDiT3 class takes the place of the tiny copy of it; num_clips: size of the data set."""

    guidance, own_column, reference_times = 3.0, "motion", reference_times()

    def __init__(self, device: str = "cpu", open_sora: Path | None = None, num_clips: int = 512) -> None:
        self.name = "video" if open_sora is None else "stdit3"
        self.device, self._open_sora = torch.device(device), open_sora
        self.teacher = build_network(open_sora).eval().to(device)
        self.text = TinyTextEncoder(device=device)
        self.text.y_embedder = self.teacher.y_embedder
        self.prompts = sorted({content.caption for content in contents()})
        self._latents, captions = clip_latents(num_clips)
        self._encoded = self.text.encode(captions)
        self.latent_shape = tuple(self._latents.shape[1:])

    def student(self, width: int | None) -> nn.Module:
        if width is not None:
            raise ValueError(f"students of world {self.name!r} start as their teacher, of its width; got width={width}")
        return build_network(self._open_sora).train().to(self.device)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(self._latents), (size,), generator=generator)
        text = {key: value[index.to(self.device)] for key, value in self._encoded.items()}
        return self._latents[index].to(self.device), {**text, **self.sizes(size)}

    def sizes(self, count: int) -> dict[str, Tensor]:
        values = {"num_frames": NUM_FRAMES, "height": HEIGHT, "width": WIDTH, "ar": HEIGHT / WIDTH, "fps": FPS}
        return {key: torch.full((count,), float(value), device=self.device) for key, value in values.items()}

    def describe(self, x: Tensor, endpoints: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        return motion(x, endpoints)


class OpenSora2:
    """Open-Sora 2.0's scripts as the PeRFlow object is called: `training_losses` distils, `sample` samples.

    Args:
        host: Of the networks.
        steps: Of the sampler.
        guidance: Scale of networks that have none folded in.
    """

    def __init__(self, host: Scripts, steps: int, guidance: float) -> None:
        self.host, self.steps, self.guidance = host, steps, guidance

    def training_losses(self, network: nn.Module, data: Tensor, model_args: Mapping[str, Any]) -> dict[str, Tensor]:
        captions, chains = model_args["captions"], model_args.get(CHAIN)
        return {"loss": self.host.loss(network, data, captions, drop=False, chains=chains)}

    def sample(self, network: nn.Module, text: Any, z: Tensor, prompts: Sequence[str], *_: Any, **__: Any) -> Tensor:
        return self.host.sample(network, z, prompts, self.steps, self.guidance)


def find_root(open_sora: Path | None) -> Path:
    """A checkout of Open-Sora 2.0: the given one, else the first of OPENSORA_ROOTS that is one.

    Raises:
        ValueError: neither is.
    """
    roots = [open_sora] if open_sora else [Path(part) for part in os.environ.get("OPENSORA_ROOTS", "").split(":") if part]
    for root in roots:
        if find_tag(root) == "2.0":
            return root.resolve()
    raise ValueError(
        f"Open-Sora 2.0's own MMDiT is needed, got {[str(root) for root in roots]}; clone hpcaitech/Open-Sora's main branch "
        "and name it with --open-sora ROOT, or in OPENSORA_ROOTS"
    )


class MMDiTWorld(World):
    """Args: open_sora: a checkout of 2.0, None: the one in OPENSORA_ROOTS. weights: the teacher's file, which is made if it is
    not there. num_clips: size of the students' data set. steps: training steps of a teacher that is made.
    """

    name, guidance, own_column, host_sampler = "mmdit", GUIDANCE, "as_described", "guided teacher, host's I2VDenoiser"
    teacher_steps = (4, 5, 8, 16, 30)  # of 5 steps the host pays 15 rows, and of 8 steps 24, where 16 are needed

    def __init__(self, open_sora: Path | None, weights: Path, num_clips: int = 512, steps: int = TEACHER_STEPS) -> None:
        self._made_by = open_sora, weights, num_clips, steps
        self.host, self.weights, self.device = Scripts(find_root(open_sora)), weights, torch.device("cpu")
        self.text, self._vae = None, TinyVAE().eval()
        self.prompts = sorted({content.caption for content in contents()})
        if not weights.is_file():
            self.host.train_teacher(*clip_latents(6 * num_clips), weights, steps=steps)
        self.teacher = self.host.network(weights).eval()
        self._latents, self._captions = clip_latents(num_clips)
        self.latent_shape = tuple(self._latents.shape[1:])

    def __reduce__(self) -> tuple[Callable[..., MMDiTWorld], tuple[Any, ...]]:
        """Another process has to make Open-Sora importable first."""
        return MMDiTWorld, self._made_by

    def student(self, width: int | None) -> nn.Module:
        return self.learner(width, {})[0]

    def learner(self, width: int | None, config: Mapping[str, Any]) -> tuple[nn.Module, OpenSora2]:
        if width is not None:
            raise ValueError(f"students of world {self.name!r} start as their teacher, of its width; got width={width}")
        # Other networks, the teacher's, keep the number of steps that they are sampled with.
        return self.host.network(self.weights, {"t2i_steps": None, **config}).train(), self.scheduler(config)

    def scheduler(self, config: Mapping[str, Any]) -> OpenSora2:
        steps = config.get("num_sampling_steps") or windows_of(config["windows"]).num_windows
        return OpenSora2(self.host, steps, self.guidance)

    @property
    def counted(self) -> type[nn.Module]:
        return type(self.teacher.final_layer)  # teachers are evaluated past the network's own hooks

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        index = torch.randint(len(self._latents), (size,), generator=generator)
        return self._latents[index], {"captions": [self._captions[i] for i in index.tolist()]}

    def stored(self, config: Mapping[str, Any], folder: Path, count: int, seed: int, further: int) -> Batches:
        generator, captions = torch.Generator().manual_seed(seed), []
        solver = self.host.chain_solver(self.teacher, config, seed)
        solver = replace(solver, origin=replace(solver.origin, first_window=further))
        writer = ChainWriter(folder, solver.origin)
        for number, first in enumerate(range(0, count, AT_ONCE)):
            _, args = self.batch(min(AT_ONCE, count - first), generator)
            part = Part(args["captions"], {}, self.latent_shape, AT_ONCE)
            ((ends, *others),) = solver.solve(part, first)
            writer.write(number, first, ends, part.captions, part.told, *others)
            captions += part.captions
        order: list[int] = []

        def batch(size: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
            if len(order) < size:
                order.extend(torch.randperm(count, generator=generator).tolist())
            rows = [order.pop() for _ in range(size)]
            return torch.zeros(size, *self.latent_shape), {
                "captions": [captions[row] for row in rows],
                CHAIN: torch.tensor(rows),
            }

        return batch

    def describe(self, x: Tensor, endpoints: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        with torch.no_grad():
            return {**motion(x, endpoints), "as_described": as_described(self._vae, x, list(prompts))}


def motion(x: Tensor, endpoints: Tensor) -> dict[str, float]:
    """Temporal-difference energy of samples, and of their difference to the endpoints, over that of the endpoints."""
    energy, error = temporal_difference_energy(endpoints), temporal_difference_energy(x - endpoints)
    return {"motion": temporal_difference_energy(x) / energy, "motion_error": error / energy}
