"""Samples of every sampler from the same noise, beside where the fine teacher carries it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from measures import squared_errors
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from worlds import World

from opensora_perflow.method.metrics import endpoint_error, energy_distance
from opensora_perflow.planning.fine_path import follow
from opensora_perflow.planning.probe import Probe
from opensora_perflow.tools.probes import guided_field

REFERENCE_STEPS = 512
AT_ONCE = 32
"""Samples whose fine path is solved together."""


@dataclass
class Evaluation:
    """Noise and prompts that every sampler gets, and where the fine teacher carries them."""

    world: World
    noise: Tensor
    prompts: list[str]
    endpoints: Tensor = field(init=False)
    floor: float = field(init=False, default=math.nan)

    @classmethod
    def of(
        cls, world: World, num_samples: int, seed: int, floor: bool = True, reference_steps: int | None = None
    ) -> Evaluation:
        """`reference_steps`: Euler steps to the endpoints; None: as the world says."""
        generator = torch.Generator().manual_seed(1000 + seed)
        noise, other = torch.randn(2, num_samples, *world.latent_shape, generator=generator).to(world.device)
        # Seeds take turns, so that few samples each see all prompts together.
        prompts = [world.prompts[(seed * num_samples + i) % len(world.prompts)] for i in range(num_samples)]
        evaluation = cls(world, noise, prompts)
        evaluation.endpoints = evaluation.reference(reference_steps)
        if not floor or world.reference_times is not None:  # too dear for the video model, whose intervals say as much
            return evaluation
        # 64 steps are the same distribution to well below the floor's own noise, and 8 times cheaper.
        again = evaluation.sample(host_sampler(world, 64), world.teacher, other)
        evaluation.floor = energy_distance(again, evaluation.endpoints)
        return evaluation

    def reference(self, steps: int | None) -> Tensor:
        """Where the fine teacher carries the noise."""
        world, times = self.world, self.world.reference_times
        if steps is not None or times is None:
            return self.sample(host_sampler(world, steps or REFERENCE_STEPS), world.teacher, progress=True)
        ends = []
        for first in range(0, len(self.noise), AT_ONCE):
            noise, prompts = self.noise[first : first + AT_ONCE], self.prompts[first : first + AT_ONCE]
            field = guided_field(world.teacher, world.text, prompts, world.sizes(len(noise)), world.guidance)
            ends.append(follow(Probe(field, noise), times, substeps=1, method="midpoint").endpoints)
        return torch.cat(ends)

    @torch.no_grad()
    def sample(self, scheduler: Any, network: nn.Module, noise: Tensor | None = None, progress: bool = False) -> Tensor:
        z, world = self.noise if noise is None else noise, self.world
        sizes = world.sizes(len(z))
        return scheduler.sample(network, world.text, z, self.prompts, world.device, additional_args=sizes, progress=progress)

    def metrics(self, x: Tensor) -> dict[str, float]:
        return {
            "endpoint_error": endpoint_error(x, self.endpoints),
            "energy_distance": energy_distance(x, self.endpoints),
            **self.world.describe(x, self.endpoints, self.prompts),
        }

    def row(self, x: Tensor) -> dict[str, Any]:
        """The measures of samples, and what tables.py makes those of all seeds from."""
        return {**self.metrics(x), "x": x.cpu(), "squared_errors": squared_errors(x, self.endpoints).cpu()}


def host_sampler(world: World, steps: int) -> Any:
    return world.scheduler(dict(windows=1, num_sampling_steps=steps, cfg_scale=world.guidance))


@contextmanager
def teacher_evaluations(kind: type[nn.Module]) -> Iterator[list[int]]:
    """Counts evaluations of frozen networks of a class, in samples: [count]."""
    samples = [0]

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, kind) and not next(module.parameters()).requires_grad:
            samples[0] += len(inputs[0])

    handle = register_module_forward_pre_hook(count)
    try:
        yield samples
    finally:
        handle.remove()
