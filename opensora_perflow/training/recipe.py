"""The method's keys, validated: each with its default and its meaning. What a host adds is in hosts/v1/keys.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from opensora_perflow.checks import (
    MOST_SCALE,
    MOST_WINDOWS,
    as_scales,
    check_keys,
    choice,
    data,
    file_name,
    is_list,
    key,
    listed,
    number,
    optional,
    section,
    switch,
    whole,
)
from opensora_perflow.method.ddpm import DDPM, PREDICTIONS
from opensora_perflow.method.guidance import draw_scales
from opensora_perflow.method.process import Process, check_prediction
from opensora_perflow.training.curriculum import COUNTS, TEACHERS, AdvanceRule, Curriculum
from opensora_perflow.training.matching import MatchingSettings
from opensora_perflow.training.plan_file import windows_of
from opensora_perflow.training.removed import kept, refuse_removed_keys, refuse_removed_value
from opensora_perflow.training.shares import check_shares
from opensora_perflow.training.watch import WatchSettings

SOLVERS = ("midpoint", "euler")
GUIDANCE_MODES = ("sync", "fixed", "range")
STARTS = ("student", "diffused")

_section = partial(section, refuse=refuse_removed_keys)


def _objective(name: str, value: Any) -> Any:
    """What a config calls an objective; `objectives.combine` knows the names."""
    items = data(name, value)
    for item in items if is_list(items) else [items]:
        refuse_removed_value(name, item.get("type") if isinstance(item, Mapping) else item)
    return items


@dataclass(frozen=True)
class TeacherSettings:
    """Where the frozen teacher comes from and how its ODE is solved."""

    from_pretrained: str | None = key(None, optional(file_name("a path, a repository id or None")))
    """Checkpoint: an Open-Sora checkpoint folder, a .safetensors / .pt / .pth / .bin file, or a Hugging Face repository id.
    None: a copy of the student's own weights at the first training step (of a run that was not resumed)."""
    stored: str | None = key(None, optional(file_name("the folder of a store or None")))
    """A folder that `opensora-perflow store` wrote. Windows then start and end where the stored chains do; no teacher is held
    or solved. Needs the dataset type perflow_stored. With `from_pretrained`: the store's teacher must have those weights."""
    steps_per_window: int | None = key(None, optional(whole(high=MOST_WINDOWS)))
    """ODE steps that the teacher takes in each window, >= 1. None: 8 over the number of windows (of the least of `windows` and
    draws.grids), rounded up."""
    solver: str = key("midpoint", kept(*SOLVERS))
    """euler (1 evaluation a step) or midpoint (2)."""
    allow_distilled: bool = key(False, switch)
    """Accept weights that are themselves a PeRFlow student, as a later stage wants. Never assumed."""

    def __post_init__(self) -> None:
        check_keys(self, "teacher.")


@dataclass(frozen=True)
class Guidance:
    """Where classifier-free guidance happens."""

    mode: str = key("sync", choice(*GUIDANCE_MODES))
    """sync: the student learns the unguided flow, with text dropout, and is guided when sampled (2 evaluations a step).
    fixed: the teacher is guided with `scale`, the student learns the result and is sampled without guidance (1 a step).
    range: the teacher is guided with a scale that is drawn for each sample. The student gets the scale as an input, see
    hosts/scale_input.py, and is sampled with any cfg_scale of the range (1 a step)."""
    scale: Any = key(None, optional(as_scales))
    """Text guidance of the teacher. Mode fixed: a number >= 0, or a list of one number a window, noisiest first. 1 = a teacher
    that needs none, itself a student of mode fixed. Mode range: (low, high), 0 <= low < high; drawn uniformly."""
    image_scale: float | None = key(None, optional(number(low=0, most=MOST_SCALE)))
    """Guidance by reference frames in modes fixed and range (Open-Sora 1.3's image/video conditioning); None: as by text."""
    negative: str | None = key(None, optional(file_name("the path of a .safetensors file or None")))
    """Modes fixed and range: a negative prompt in place of the null text, as a file that `opensora-perflow embed` wrote."""

    def __post_init__(self) -> None:
        check_keys(self, "guidance.")
        if self.mode == "sync":
            self._check_sync()
        else:
            self._check_scale()

    def _check_sync(self) -> None:
        given = {name: getattr(self, name) for name in ("scale", "image_scale", "negative")}
        listed = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        if listed:
            raise ValueError(
                f'guidance mode "sync" takes no scale, image_scale or negative, got {listed}; set cfg_scale for sampling, or '
                'mode="fixed" to fold the scale into the student'
            )

    def _check_scale(self) -> None:
        if self.scale is None:
            example = "7.0" if self.mode == "fixed" else "(1.0, 9.0)"
            raise ValueError(
                f'guidance mode "{self.mode}" needs a scale, for example dict(mode="{self.mode}", scale={example})'
            )
        pair = isinstance(self.scale, tuple) and len(self.scale) == 2
        if self.mode == "range" and not (pair and self.scale[0] < self.scale[1]):
            raise ValueError(
                f'guidance mode "range" needs scale=(low, high) with low < high, got {self.scale!r}; for one scale use '
                'mode="fixed"'
            )

    @classmethod
    def recorded(cls, values: Mapping[str, Any], num_windows: int) -> Guidance:
        """The guidance that a student's state names, for a sampler with so many windows, which reads no folded scale."""
        known = {name: value for name, value in values.items() if name in {f.name for f in fields(cls)}}
        scale = known.get("scale")
        if known.get("mode") == "fixed" and isinstance(scale, list) and len(scale) != num_windows:
            known["scale"] = scale[0]
        return cls(**known)

    @cached_property
    def folded(self) -> bool:
        """Whether guidance is in the student's weights: it is sampled with one evaluation a step, and trained without text
        dropout."""
        return self.mode != "sync"

    def scale_in(self, window_idx: Tensor) -> float | Tensor:
        """What guides the teacher in windows [B] where nothing is drawn: one scale, or one a sample [B], float64."""
        if isinstance(self.scale, tuple):
            return torch.tensor(self.scale, dtype=torch.float64, device=window_idx.device)[window_idx]
        return 1.0 if self.mode == "sync" else self.scale

    def draw_scale(self, window_idx: Tensor, generator: torch.Generator) -> float | Tensor:
        """What guides the teacher in a training step: as `scale_in`, or drawn for each sample in mode range."""
        if self.mode != "range":
            return self.scale_in(window_idx)
        return draw_scales(*self.scale, len(window_idx), device=window_idx.device, generator=generator)

    def check_told(self, scales: Sequence[float], key: str = "cfg_scale, or guidance_scale=,") -> None:
        """Raises ValueError for scales that a student of mode range was not trained for. `key`: Where they were set."""
        if self.mode != "range":
            return
        low, high = self.scale
        outside = [scale for scale in scales if not low <= scale <= high]
        if outside:
            raise ValueError(
                f"the student takes guidance scales from {low:g} to {high:g}, for which it was trained "
                f"(guidance.scale), got {outside[0]:g}; set {key} to a scale in that range"
            )


@dataclass(frozen=True)
class Draws:
    """What the student is trained on: where windows start, and at which times inside them."""

    starts: str = key("student", kept(*STARTS))
    """student: states that the student itself reaches from noise, one step a window, guided as it is sampled. Of the data only
    the shape is used. diffused: data with noise."""
    edge_mass: float = key(0.75, number(low=0, high=1))
    """Share of the times exactly at the window's noisy edge, 0..1."""
    per_solve: int | None = key(None, optional(whole(high=100)))
    """Times that one solution of the teacher feeds, >= 1. Each is an evaluation of the student, its gradient included; the
    loss is their mean (weighted by edge_mass). None: 2, or 1 where there can be one only (edge_mass=1,
    use_discrete_timesteps) and under Open-Sora 1.0 and 1.1."""
    shares: Any = key((), listed(number(low=1e-3), "a list of numbers, one a window", "[1, 2, 2, 1]"))
    """How often each window is drawn, noisiest first, relative to the others. (): each as often."""
    seed: int | None = key(None, optional(whole(None, 2**64, accepted="an integer, or None for the host's")))
    """Seed of all that training draws (see randomness.py), mixed with the data-parallel rank. None: the seed in the host's
    config, without one that of torch.manual_seed."""
    overlap: float = key(0.0, number(low=0, high=1))
    """How far the lines of a window are continued over its noisy edge, as a share 0..1 of the window above. Both windows train
    those times; weights fall and rise linearly (see overlap.py). prediction="velocity" only, as `grids`."""
    grids: Any = key((), listed(whole(high=MOST_WINDOWS), "a list of numbers of steps", "[5, 6, 7]", most=100))
    """Numbers of sampling steps whose uniform grids are windows of the student as well, each as often as `windows`. The student
    is trained for their steps too, wherever they cross an edge of `windows` (see overlap.py). Sample with
    sampling_grid="uniform"."""
    two_time: bool = key(False, switch)
    """Tell the network where its step ends, as an input: a flow map u(x, t, s), so that the steps of all `grids` can be learned
    by one student. prediction="velocity" only."""

    def __post_init__(self) -> None:
        check_keys(self, "draws.")
        if self.two_time and not self.grids:
            raise ValueError(
                "draws.two_time tells the steps of several grids apart, and draws.grids names none; write windows=8 and "
                "draws=dict(grids=[1, 2, 4], two_time=True)"
            )
        if self.edge_mass == 1 and (self.per_solve or 1) > 1:
            raise ValueError(
                f"draws.edge_mass=1 leaves one time in a window, got per_solve={self.per_solve!r}; use per_solve=1 or less mass"
            )


@dataclass(frozen=True)
class Stages:
    """Fewer windows stage by stage; see curriculum.py."""

    windows: Any = key((8, 4, 2, 1), COUNTS)
    """Number of windows of each stage, descending; each divides the one before, and the first is that of `windows`."""
    teacher: str = key("original", choice(*TEACHERS))
    """original: the run's teacher in every stage, with teacher.steps_per_window steps for each window of the first stage.
    previous: from the second stage on the student as it was when the stage before ended. It takes one Euler step for each of
    that stage's windows, without guidance, which is folded in. A run that is resumed inside such a stage goes on with the
    student that it loads as the teacher: the one before is not kept."""
    advance: AdvanceRule = key(AdvanceRule(), _section(AdvanceRule))
    """When a stage ends: dict(min_steps=200, max_steps=2000), and between them where its held-out error stops falling."""

    def __post_init__(self) -> None:
        check_keys(self, "curriculum.")


@dataclass(frozen=True)
class Recipe:
    """How a student is trained, and what of that its sampler has to know."""

    windows: Any = key(4, lambda name, value: windows_of(value))
    """Number K >= 1 of uniform windows; a descending list of edges from 1 to 0 in untransformed time; or a plan's file (a name
    that ends in .json). `opensora-perflow plan` writes plans, whose sampling grids serve the step counts they are for."""
    prediction: str = key("auto", choice("auto", *PREDICTIONS))
    """What the student's network outputs: velocity; or, for epsilon networks, ddim_eps or diff_eps too, see method/ddpm.py.
    auto: velocity for rectified flows, ddim_eps for epsilon networks. Sample with what was trained."""
    teacher: TeacherSettings = key(TeacherSettings(), _section(TeacherSettings))
    guidance: Guidance = key(Guidance(), _section(Guidance))
    draws: Draws = key(Draws(), _section(Draws))
    curriculum: Stages | None = key(None, _section(Stages, none=True))
    """Training only: merge `windows` stage by stage. None: one stage. Sample with windows=the last stage's."""
    objective: Any = key("perflow", _objective)
    """Name of a registered objective, dict(type=name, weight=1.0, its keywords), or a list of those, which are added."""
    matching: MatchingSettings | None = key(None, _section(MatchingSettings, none=True))
    """Training only: dict(weight=0.5). Also match the distribution of the student's ends, see fake_score.py. None: off."""
    watch: WatchSettings | None = key(WatchSettings(), _section(WatchSettings, none=True))
    """Training only: dict(every=200, tolerance=0.25, policy="warn"). Every so many steps the log says how far the student's few
    steps end from the teacher on the run's first batch. It warns where that gets worse (see monitor.py), and where a step's own
    numbers go wrong (see guard.py). None: off."""
    allow_change: bool = key(False, switch)
    """Go on with --load although windows, process, prediction, guidance or the teacher are not those that the checkpoint was
    trained with (see state.py)."""

    def __post_init__(self) -> None:
        check_keys(self)
        if self.curriculum is not None:
            self._check_curriculum()
        if self.draws.shares:
            check_shares(self.draws.shares, self.windows.num_windows, self.needs_one_scale)
        if self.teacher.stored is not None:
            self._check_stored()
        if self.guidance.mode == "fixed":
            as_scales("guidance.scale", self.guidance.scale, self.windows.num_windows)
            if self.needs_one_scale:
                refuse_list_of_scales("guidance.scale", self.guidance.scale, self.needs_one_scale)

    @property
    def needs_one_scale(self) -> str:
        """Why one scale a window has no meaning; empty where there is a meaning."""
        if self.curriculum is not None:
            return "a curriculum merges windows"
        return "draws.grids trains windows of other grids" if self.draws.grids else ""

    @cached_property
    def times_a_solve(self) -> int:
        """Times that one solution of the teacher feeds."""
        if self.draws.per_solve is not None:
            return self.draws.per_solve
        return 1 if self.draws.edge_mass == 1 else 2

    @cached_property
    def teacher_steps(self) -> int:
        """The teacher's steps in each window."""
        each = self.teacher.steps_per_window
        fewest = min([self.windows.num_windows, *self.draws.grids])
        return math.ceil(8 / fewest) if each is None else each

    def stages(self) -> Curriculum | None:
        """A curriculum at its beginning, if there is one."""
        stages = self.curriculum
        return None if stages is None else Curriculum(self.windows, stages.windows, stages.teacher, stages.advance)

    def same_stages(self, other: Recipe | None) -> bool:
        """Has another recipe the same curriculum?"""
        if other is None or self.curriculum != other.curriculum:
            return False
        return self.curriculum is None or self.windows == other.windows

    def check_process(self, process: Process) -> str:
        """What a student outputs whose network was trained on a process.

        Raises:
            ValueError: a prediction that the process has not, or that this recipe cannot use.
        """
        prediction = check_prediction(process, self.prediction)
        if prediction != "velocity" and (self.draws.overlap > 0 or self.draws.grids):
            raise ValueError(
                f'draws.overlap and draws.grids blend velocities, but prediction="{prediction}" means another velocity in '
                'every window; use prediction="velocity", or overlap=0 and grids=()'
            )
        distils_students = self.curriculum is not None and self.curriculum.teacher == "previous"
        if self.matching is not None and (distils_students or self.teacher.allow_distilled or isinstance(process, DDPM)):
            raise ValueError(
                "matching needs the score of an original rectified flow, not of iddpm networks, nor of students as teachers"
            )
        if distils_students and isinstance(process, DDPM) and prediction != "ddim_eps":
            raise ValueError(
                f'curriculum.teacher="previous" lets students take DDIM steps over their windows on path="ddpm", which one '
                f'with prediction="{prediction}" was not trained for; use prediction="ddim_eps", or teacher="original"'
            )
        return prediction

    def _check_stored(self) -> None:
        other = {
            'curriculum.teacher="previous"': self.curriculum is not None and self.curriculum.teacher == "previous",
            "matching": self.matching is not None,
        }
        found = [name for name, is_set in other.items() if is_set]
        if found:
            raise ValueError(
                f"teacher.stored trains from stored chains, and {found[0]} wants a teacher that is asked; leave one of them out"
            )

    def _check_curriculum(self) -> None:
        if self.draws.overlap > 0 or self.draws.grids:
            raise ValueError(
                "a curriculum's teacher steps from edge to edge of merged windows, which overlapping windows do not share; use "
                "draws.overlap=0 and draws.grids=()"
            )
        self.stages()


def refuse_list_of_scales(name: str, value: Any, why: str) -> None:
    """Raises ValueError where a scale is a list of one a window."""
    if isinstance(value, tuple):
        raise ValueError(f"{why}, so one scale a window has no meaning, got {name}={list(value)}; give one number")
