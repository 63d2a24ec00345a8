"""A tiny video model and its student from the same noise: their samples, what these cost, and the teacher's fine path."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.method.metrics import endpoint_error
from opensora_perflow.method.motion import motion_report
from opensora_perflow.method.solvers import Velocity, solve
from opensora_perflow.planning.fine_path import FinePath, follow
from opensora_perflow.planning.plane import in_plane
from opensora_perflow.planning.probe import Probe
from opensora_perflow.registry import SCHEDULERS, build_module
from opensora_perflow.tools.probes import guided_field

WINDOWS = (1.0, 0.90625, 0.796875, 0.53125, 0.0)
"""Every second edge of those that `opensora-perflow plan --windows 8` chose for the tiny teacher: most errors begin early."""
REFERENCE = (10, 8, 10, 8)
"""Midpoint steps in each window of the guided teacher that the others are compared with: most where the path is curved. As near
to the converged path as 512 Euler steps, see benchmarks/README.md."""
DRAWN = 3
"""Samples whose paths are kept for a chart."""


@dataclass(frozen=True)
class Batch:
    """Noise and prompts that every sampler gets, with the sizes that Open-Sora's scripts send along."""

    noise: Tensor
    prompts: list[str]
    sizes: dict[str, Tensor]


@dataclass(frozen=True)
class TeacherPath:
    """The guided teacher's fine path, and the CPU seconds that it took."""

    fine: FinePath
    seconds: float

    @property
    def end(self) -> Tensor:
        """[B, ...]."""
        return self.fine.states[-1]

    def at(self, edges: Sequence[float]) -> Tensor:
        """The states [K + 1, B, ...] at window edges, all of which the path was asked for."""
        times = self.fine.times.tolist()
        return self.fine.states[[times.index(edge) for edge in edges]]


@dataclass(frozen=True)
class Sampled:
    """latents: [B, ...]. states: Where each step began, [S, B, ...]. nfe: Network evaluations a sample. seconds: Of the CPU."""

    latents: Tensor
    states: Tensor
    nfe: int
    seconds: float


def teacher_sampler(steps: int, guidance_scale: float) -> Any:
    """The teacher's own sampler: one window and guidance make `perflow` Open-Sora's rflow (benchmarks/sampler_parity.py)."""
    return build_module(dict(type="perflow", windows=1, num_sampling_steps=steps, cfg_scale=guidance_scale), SCHEDULERS)


@torch.no_grad()
def teacher_path(
    teacher: nn.Module,
    text_encoder: Any,
    batch: Batch,
    guidance_scale: float,
    edges: Sequence[float] = WINDOWS,
    progress: bool = False,
) -> TeacherPath:
    """Follow the guided teacher in the steps of REFERENCE; window edges between them are further steps."""
    velocity = guided_field(teacher, text_encoder, batch.prompts, batch.sizes, guidance_scale)
    return _followed(Probe(velocity, batch.noise), {*reference_times(), *edges}, progress)


def follow_reference(probe: Probe, windows: Sequence[float], progress: bool = False) -> TeacherPath:
    """Follow a guided teacher in the steps of REFERENCE in each of the windows, four."""
    return _followed(probe, set(reference_times(windows)), progress)


def _followed(probe: Probe, times: set[float], progress: bool) -> TeacherPath:
    start = time.process_time()
    path = follow(probe, sorted(times, reverse=True), substeps=1, method="midpoint", progress=progress)
    return TeacherPath(path, time.process_time() - start)


def reference_times(edges: Sequence[float] = WINDOWS) -> list[float]:
    """The grid of REFERENCE, from 1 to 0."""
    windows = zip(edges, edges[1:], REFERENCE)
    return [start + (end - start) * i / count for start, end, count in windows for i in range(count)] + [0.0]


@torch.no_grad()
def sample(scheduler: Any, network: nn.Module, text_encoder: Any, batch: Batch, progress: bool = False) -> Sampled:
    """A scheduler's samples, and what the network was asked for them."""
    start = time.process_time()
    with _evaluations(network) as asked:
        latents = scheduler.sample(
            network, text_encoder, batch.noise, batch.prompts, "cpu", additional_args=batch.sizes, progress=progress
        )
    count = len(batch.noise)
    return Sampled(latents, torch.stack([x[:count] for x in asked]), sum(map(len, asked)) // count, time.process_time() - start)


@contextmanager
def _evaluations(network: nn.Module) -> Iterator[list[Tensor]]:
    """The states that a network is evaluated at, a tensor [B * branches, ...] each."""
    asked: list[Tensor] = []
    handle = network.register_forward_pre_hook(lambda module, arguments: asked.append(arguments[0]))
    try:
        yield asked
    finally:
        handle.remove()


@torch.no_grad()
def window_errors(
    edges: Sequence[float], teacher: Velocity, student: Velocity, states: Tensor, ratio: Tensor | None = None
) -> list[dict[str, Any]]:
    """Error of one step across each window, from the teacher's own state at its noisy edge, and the motion it points at.

    Args:
        edges: Of the windows, K + 1, untransformed. states: The teacher's path there, [K + 1, B, ...].
        ratio: Of the warp of time, [B]; None: there is none.
    """
    rows, warped = [], Probe(student, states[0], ratio).flow_times(edges)
    for k, (t_start, t_end) in enumerate(zip(edges, edges[1:])):
        ends = {
            name: solve(field, states[k], warped[k : k + 2]) for name, field in (("teacher", teacher), ("student", student))
        }
        errors = {name: endpoint_error(end, states[k + 1]) for name, end in ends.items()}
        rows.append({"t_start": t_start, "t_end": t_end, **errors})
    motion = motion_report(student, list(states), warped)
    return [{**row, "motion": asdict(window)} for row, window in zip(rows, motion)]


def drawn_paths(path: TeacherPath, student: Sampled, prompts: Sequence[str]) -> dict[str, Any]:
    """The teacher's fine path and the student's steps in a plane, of the first samples, as they go to results.json."""
    steps = torch.cat([student.states, student.latents[None]])[:, :DRAWN]
    planes = in_plane(path.fine.states[:, :DRAWN], steps)
    teacher, own = ([[[round(c, 4) for c in point] for point in one] for one in plane.tolist()] for plane in planes)
    return {"times": path.fine.times.tolist(), "prompts": list(prompts[:DRAWN]), "teacher": teacher, "student": own}
