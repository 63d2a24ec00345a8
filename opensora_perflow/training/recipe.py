"""The scheduler's config, validated: every key, its default and its meaning in one place."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from opensora_perflow.method.grids import TIME_DISTRIBUTIONS, check_num_steps
from opensora_perflow.method.predictions import PREDICTIONS
from opensora_perflow.method.process import NOISE_SCHEDULES
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.training.curriculum import AdvanceRule, Curriculum
from opensora_perflow.training.monitor import WatchConfig
from opensora_perflow.training.removed import refuse_removed_keys, refuse_removed_value

SAMPLING_GRIDS = ("edges", "uniform")
TEACHER_SOLVERS = ("midpoint", "euler")
GUIDANCE_MODES = ("sync", "fixed", "range")
STARTS = ("diffused", "student")
TRANSFORM_FORMULAS = ("auto", "v1.2", "v1.3")
PATHS = ("auto", "linear", "ddpm")
PATH_KEYS = {
    "linear": (
        "transform",
        "num_timesteps",
        "use_discrete_timesteps",
        "use_timestep_transform",
        "sample_method",
        "loc",
        "scale",
        "transform_scale",
        "scale_temporal",
        "uniform_over_threshold",
        "drop_condition",
        "x_cond_weight",
        "use_oscillation_guidance",
        "force_num",
        "use_flaw_fix",
        "scale_image_weight",
        "initial_image_scale",
    ),
    "ddpm": (
        "cfg_channel",
        "timestep_respacing",
        "noise_schedule",
        "diffusion_steps",
        "learn_sigma",
        "sigma_small",
        "predict_xstart",
        "use_kl",
        "rescale_learned_sigmas",
    ),
}
"""Keys that only one path has: those of Open-Sora's rflow and of its iddpm. All others belong to both."""


def from_mapping(cls: type, value: Mapping[str, Any], where: str) -> Any:
    """Build a settings dataclass from a config dict, refusing keys that it does not have.

    Raises:
        ValueError: unknown keys (with the closest known ones), or values that the dataclass refuses.
    """
    known = [f.name for f in fields(cls)]
    unknown = [key for key in value if key not in known]
    refuse_removed_keys(where, unknown)
    if unknown:
        close = [match for key in unknown for match in difflib.get_close_matches(str(key), known, n=1)]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(f"unknown key(s) {', '.join(map(repr, unknown))} in {where}{hint} Known keys: {', '.join(known)}")
    return cls(**value)


def path_of_keys(config: Mapping[str, Any]) -> str:
    """The path that a config names: by its key `path`, or by keys that only rflow or only iddpm has; else "auto".

    A config that replaced type="iddpm" or type="rflow" by "perflow" usually carries such keys.

    Raises:
        ValueError: keys of both, or keys of one and `path` naming the other.
    """
    named = config.get("path", "auto")
    found = {path: [key for key in keys if key in config] for path, keys in PATH_KEYS.items()}
    for path, other in (("linear", "ddpm"), ("ddpm", "linear")):
        if found[path] and (found[other] or named == other):
            raise ValueError(
                f'{", ".join(found[path])} belong{"s" if len(found[path]) == 1 else ""} to path="{path}" '
                f"({'rflow' if path == 'linear' else 'iddpm'}), but "
                + (f'{", ".join(found[other])} to path="{other}"' if found[other] else f'the config says path="{other}"')
                + "; keep those of the scheduler that the network was trained with"
            )
    if named == "auto":
        return next((path for path, keys in found.items() if keys), "auto")
    return named


def check_number(name: str, value: Any, low: float | None = None, high: float | None = None) -> None:
    """Raises ValueError unless value is a real number (and at least `low`, and at most `high`)."""
    out = isinstance(value, Real) and ((low is not None and not value >= low) or (high is not None and not value <= high))
    if isinstance(value, bool) or not isinstance(value, Real) or out:
        bound = ("" if low is None else f" >= {low:g}") + ("" if high is None else f" and <= {high:g}")
        raise ValueError(f"{name} must be a number{bound}, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def as_scales(name: str, value: Any, num_windows: int | None = None) -> Any:
    """A guidance scale >= 0 as it is, or a list of them as a tuple.

    Raises:
        ValueError: anything else, or a list without exactly one number a window.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        check_number(name, value, low=0)
        return value
    for i, scale in enumerate(value):
        check_number(f"{name}[{i}]", scale, low=0)
    if num_windows is not None and len(value) != num_windows:
        raise ValueError(
            f"{name} must be one number, or one for each of the {num_windows} windows, noisiest first, got {list(value)}"
        )
    return tuple(value)


@dataclass(frozen=True)
class TeacherConfig:
    """Where the frozen teacher comes from and how its ODE is solved."""

    from_pretrained: str | None = None
    """Checkpoint: an Open-Sora checkpoint folder, a .safetensors / .pt / .pth / .bin file, or a Hugging Face repository id.
    None: a copy of the student's own weights at the first training step (of a run that was not resumed)."""
    steps_per_window: int | None = None
    """ODE steps that the teacher takes in each window, >= 1. None: 8 over the number of windows (of the least of `windows` and
    draws.grids), rounded up."""
    solver: str = "midpoint"
    """euler (1 evaluation a step) or midpoint (2)."""
    allow_distilled: bool = False
    """Accept weights that are themselves a PeRFlow student, as a later stage wants. Never assumed."""

    def __post_init__(self) -> None:
        if self.from_pretrained is not None and not isinstance(self.from_pretrained, (str, os.PathLike)):
            raise ValueError(f"teacher.from_pretrained must be a path, a repository id or None, got {self.from_pretrained!r}")
        if self.steps_per_window is not None:
            check_num_steps(self.steps_per_window, "teacher.steps_per_window")
        refuse_removed_value("teacher.solver", self.solver)
        check_choice("teacher.solver", self.solver, TEACHER_SOLVERS)
        if not isinstance(self.allow_distilled, bool):
            raise ValueError(f"teacher.allow_distilled must be True or False, got {self.allow_distilled!r}")


@dataclass(frozen=True)
class GuidanceConfig:
    """Where classifier-free guidance happens."""

    mode: str = "sync"
    """sync: the student learns the unguided flow, with text dropout, and is guided when sampled (2 evaluations a step).
    fixed: the teacher is guided with `scale`, the student learns the result and is sampled without guidance (1 a step).
    range: the teacher is guided with a scale that is drawn for each sample, and the student gets it as an input, see
    hosts/v1/scale_input.py; it is sampled with any cfg_scale of the range (1 a step)."""
    scale: Any = None
    """Text guidance of the teacher. Mode fixed: a number >= 0 (1 = a teacher that needs none, itself a student of mode fixed),
    or a list of one number a window, noisiest first. Mode range: (low, high), 0 <= low < high; drawn uniformly."""
    image_scale: float | None = None
    """Guidance by reference frames in modes fixed and range (Open-Sora 1.3's image/video conditioning); None: as by text."""
    negative: str | None = None
    """Modes fixed and range: a negative prompt in place of the null text, as a file that `opensora-perflow embed` wrote."""

    def __post_init__(self) -> None:
        check_choice("guidance.mode", self.mode, GUIDANCE_MODES)
        if self.mode == "sync":
            given = {name: getattr(self, name) for name in ("scale", "image_scale", "negative")}
            if any(value is not None for value in given.values()):
                raise ValueError(
                    'guidance mode "sync" takes no scale, image_scale or negative, got '
                    + ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
                    + '; set cfg_scale for sampling, or mode="fixed" to fold the scale into the student'
                )
            return
        if self.scale is None:
            example = "7.0" if self.mode == "fixed" else "(1.0, 9.0)"
            raise ValueError(
                f'guidance mode "{self.mode}" needs a scale, for example dict(mode="{self.mode}", scale={example})'
            )
        object.__setattr__(self, "scale", as_scales("guidance.scale", self.scale))
        pair = isinstance(self.scale, tuple) and len(self.scale) == 2
        if self.mode == "range" and not (pair and self.scale[0] < self.scale[1]):
            raise ValueError(
                f'guidance mode "range" needs scale=(low, high) with low < high, got {self.scale!r}; for one scale use '
                'mode="fixed"'
            )
        if self.image_scale is not None:
            check_number("guidance.image_scale", self.image_scale, low=0)
        if self.negative is not None and not isinstance(self.negative, (str, os.PathLike)):
            raise ValueError(f"guidance.negative must be the path of a .safetensors file or None, got {self.negative!r}")
        if self.negative is not None:
            object.__setattr__(self, "negative", os.fspath(self.negative))  # as perflow.json can hold it

    @property
    def folded(self) -> bool:
        """Whether guidance is in the student's weights: it is sampled with one evaluation a step, and trained without text
        dropout."""
        return self.mode != "sync"


@dataclass(frozen=True)
class DrawsConfig:
    """What the student is trained on: where windows start, and at which times inside them."""

    starts: str = "student"
    """student: states that the student itself reaches from noise, one step a window, guided as it is sampled; no data is
    used, only its shape. diffused: data with noise."""
    edge_mass: float = 0.75
    """Share of the times exactly at the window's noisy edge, 0..1."""
    per_solve: int | None = None
    """Times that one solution of the teacher feeds, >= 1. Each is an evaluation of the student, its gradient included; the
    loss is their mean (weighted by edge_mass). None: 2, or 1 where there can be one only (edge_mass=1,
    use_discrete_timesteps) and under Open-Sora 1.0 and 1.1."""
    seed: int | None = None
    """Seed of all that training draws (see randomness.py), mixed with the data-parallel rank. None: the seed in the host's
    config, without one that of torch.manual_seed."""
    overlap: float = 0.0
    """How far the lines of a window are continued over its noisy edge, as a share 0..1 of the window above, which trains those
    times too; weights fall and rise linearly (see overlap.py). prediction="velocity" only, as `grids`."""
    grids: Any = ()
    """Numbers of sampling steps whose uniform grids are windows of the student as well, each as often as `windows`: it is
    then trained for their steps too, wherever they cross an edge of `windows` (see overlap.py). Sample with
    sampling_grid="uniform"."""

    def __post_init__(self) -> None:
        refuse_removed_value("draws.starts", self.starts)
        check_choice("draws.starts", self.starts, STARTS)
        check_number("draws.edge_mass", self.edge_mass, low=0, high=1)
        if self.per_solve is not None:
            check_num_steps(self.per_solve, "draws.per_solve")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ValueError(f"draws.seed must be an integer, or None for the host's, got {self.seed!r}")
        check_number("draws.overlap", self.overlap, low=0, high=1)
        if not isinstance(self.grids, Sequence) or isinstance(self.grids, str):
            raise ValueError(f"draws.grids must be a list of numbers of steps, got {self.grids!r}; write for example [5, 6, 7]")
        for steps in self.grids:
            check_num_steps(steps, "each of draws.grids")
        object.__setattr__(self, "grids", tuple(int(steps) for steps in self.grids))
        if self.edge_mass == 1 and (self.per_solve or 1) > 1:
            raise ValueError(
                f"draws.edge_mass=1 leaves one time in a window, got per_solve={self.per_solve!r}; use per_solve=1 or less mass"
            )


@dataclass(frozen=True)
class CurriculumConfig:
    """Fewer windows stage by stage; see curriculum.py."""

    windows: Any = (8, 4, 2, 1)
    """Number of windows of each stage, descending; each divides the one before, and the first is that of `windows`."""
    teacher: str = "original"
    """original: the run's teacher in every stage, with teacher.steps_per_window steps for each window of the first stage.
    previous: from the second stage on the student as it was when the stage before ended, with one Euler step for each of
    that stage's windows and without guidance, which is folded in. A run that is resumed inside such a stage goes on with the
    student that it loads as the teacher: the one before is not kept."""
    advance: AdvanceRule = field(default_factory=AdvanceRule)
    """When a stage ends: dict(min_steps=200, max_steps=2000), and between them where its held-out error stops falling."""

    def __post_init__(self) -> None:
        if isinstance(self.advance, Mapping):
            object.__setattr__(self, "advance", from_mapping(AdvanceRule, self.advance, "curriculum.advance"))
        elif not isinstance(self.advance, AdvanceRule):
            raise ValueError(f"curriculum.advance must be a dict, got {self.advance!r}; known keys: min_steps, max_steps")


@dataclass(frozen=True)
class LongVideoConfig:
    """How the clips of a long video (Open-Sora's `loop`) are joined at the frames that they share, in every clip that has
    reference frames. Those come back as they were given."""

    edit: float = 0.05
    """Reference frames of edit ratio 0 are made anew from this flow time on while the others are generated, 0..1; 0 keeps them.
    Between two grid points it costs an evaluation a clip; 0.75 is one of 4 uniform windows. Small values change little; 0.75
    softened the seams of one model and broke another's (benchmarks/README.md). No effect with mask_index (v1.3), where the
    network makes them anew anyway."""
    frames: int = 2
    """Latent frames beside reference frames over which the difference is faded out, >= 0; see long_video.py."""

    def __post_init__(self) -> None:
        check_number("long_video.edit", self.edit, low=0, high=1)
        if isinstance(self.frames, bool) or not isinstance(self.frames, int) or self.frames < 0:
            raise ValueError(f"long_video.frames must be an integer >= 0, got {self.frames!r}")


@dataclass(frozen=True)
class PeRFlowConfig:
    """All keys of `scheduler=dict(type="perflow", ...)`.

    The second half are the keys of Open-Sora's rflow with their upstream meaning, so that an existing config switches by its
    `type` alone.
    """

    windows: Any = 4
    """Number K >= 1 of uniform windows; a descending list of edges from 1 to 0 in untransformed time; or the file that
    `opensora-perflow plan` wrote (a name that ends in .json), whose sampling grids then serve the step counts they are for."""
    path: str = "auto"
    """What the network was trained on. linear: rectified flow (rflow); ddpm: a diffusion, epsilon and usually a learned
    variance (iddpm; dpm-solver samples the same networks). auto: the one whose keys are in this config (see PATH_KEYS), else
    what the host and its network allow (see hosts/v1/host_path.py)."""
    prediction: str = "auto"
    """What the student's network outputs: velocity; or, on the ddpm path, ddim_eps or diff_eps too, see predictions.py.
    auto: velocity on the linear path, ddim_eps on the ddpm path. Sample with what was trained."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    draws: DrawsConfig = field(default_factory=DrawsConfig)
    curriculum: CurriculumConfig | None = None
    """Training only: merge `windows` stage by stage. None: one stage. Sample with windows=the last stage's."""
    objective: Any = "perflow"
    """Name of a registered objective, dict(type=name, weight=1.0, its keywords), or a list of those, which are added."""
    watch: WatchConfig | None = field(default_factory=WatchConfig)
    """Training only: dict(every=200, tolerance=0.25): log every so many steps how far the student's few steps end from the
    teacher on the run's first batch, and warn where that gets worse (see held_out.py). None: off."""
    allow_change: bool = False
    """Go on with --load although windows, path, prediction, guidance or the teacher are not those that the checkpoint was
    trained with (see state.py)."""
    transform: str = "auto"
    """Which host's timestep transform: v1.2 and v1.3 count latent frames differently. auto: the installed host's."""

    long_video: LongVideoConfig | None = None
    """dict(edit=0.05, frames=2): smoother, less repetitive long videos, see LongVideoConfig. None: join clips as upstream."""

    num_sampling_steps: int | None = None
    """Sampling steps, >= 1; None: one a window, or those of the only grid in the plan that `windows` names. A multiple of the
    number of windows serves every window alike."""
    sampling_grid: str = "edges"
    """edges: every window edge is a sampling time, and the steps left over go to the noisiest windows, or to where the plan
    that `windows` names wants them; uniform: the host's own grid 1, 1 - 1/N, ..., whose steps may cross an edge. The same
    where the number of windows divides that of steps."""
    num_timesteps: int = 1000
    """Size of the network's timestep range."""
    cfg_scale: Any = 4.0
    """Guidance when sampling in mode sync, and the scale that the student is told in mode range (which must hold it): a number,
    or a list of one a window, noisiest first. No effect in mode fixed."""
    use_discrete_timesteps: bool = False
    """Round drawn times, window edges and the sampling grid to whole timesteps."""
    use_timestep_transform: bool = False
    """Warp time by resolution and length."""
    sample_method: str = "uniform"
    """Open-Sora's distribution of training times, uniform or logit-normal. No effect: windows are drawn equally often, and
    times evenly inside them."""
    loc: float = 0.0
    """As sample_method: no effect."""
    scale: float = 1.0
    """As sample_method: no effect."""
    transform_scale: float = 1.0
    """Factor on the warp's ratio, > 0, in sampling and windows under v1.3. No effect under v1.2, where it warps drawn times."""
    scale_temporal: bool = True
    """False: the warp ignores the number of frames (v1.3)."""
    uniform_over_threshold: float | None = None
    """As sample_method: no effect (v1.3)."""
    drop_condition: Mapping[str, float] | None = None
    """Weights of null / cond / text / keep for image and video conditioning in mode sync (v1.3); None: always keep."""
    x_cond_weight: float = 1.0
    """Loss weight of the conditioned frames (v1.3)."""
    use_oscillation_guidance: bool = False
    """Guidance on even steps only, after the first force_num (v1.3)."""
    force_num: int = 10
    """Guided steps before the oscillation begins."""
    use_flaw_fix: bool = False
    """Rescale the guided prediction's standard deviation (v1.3)."""
    scale_image_weight: bool = False
    """Image guidance decays over the steps and grows over the frames (v1.3)."""
    initial_image_scale: float = 1.0
    """Where scale_image_weight decays to."""

    cfg_channel: int | str | None = "auto"
    """iddpm: guidance acts on the first so many channels; None: on all. auto: 3 under Open-Sora 1.0, which knows no other;
    all under later ones."""
    timestep_respacing: str | int | None = None
    """iddpm's other name of num_sampling_steps; "" and None leave that to num_sampling_steps."""
    noise_schedule: str = "linear"
    """iddpm: linear or squaredcos_cap_v2, see paths.alpha_bars."""
    diffusion_steps: int = 1000
    """iddpm: size of the network's timestep range."""
    learn_sigma: bool = True
    """iddpm: True keeps the network's variance half as the teacher's, so that iddpm can sample the student too, at an
    evaluation of the teacher for each time that is trained. False: there is none worth keeping. No effect with
    prediction="velocity"."""
    sigma_small: bool = False
    """iddpm; only False."""
    predict_xstart: bool = False
    """iddpm; only False."""
    use_kl: bool = False
    """iddpm; only False."""
    rescale_learned_sigmas: bool = False
    """iddpm; only False."""

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # a frozen dataclass normalises its own fields this way
        set_(self, "windows", TimeWindows.from_config(self.windows))
        for name, cls in (("teacher", TeacherConfig), ("guidance", GuidanceConfig), ("draws", DrawsConfig)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                set_(self, name, from_mapping(cls, value, name))
            elif not isinstance(value, cls):
                raise ValueError(f"{name} must be a dict, got {value!r}; known keys: {', '.join(f.name for f in fields(cls))}")
        if isinstance(self.curriculum, Mapping):
            set_(self, "curriculum", from_mapping(CurriculumConfig, self.curriculum, "curriculum"))
        if self.curriculum is not None:
            self._check_curriculum()
        if isinstance(self.watch, Mapping):
            set_(self, "watch", from_mapping(WatchConfig, self.watch, "watch"))
        elif not isinstance(self.watch, WatchConfig | None):
            raise ValueError(f"watch must be a dict or None, got {self.watch!r}; write for example dict(every=200)")
        if isinstance(self.long_video, Mapping):
            set_(self, "long_video", from_mapping(LongVideoConfig, self.long_video, "long_video"))
        elif not isinstance(self.long_video, LongVideoConfig | None):
            raise ValueError(
                f"long_video must be a dict or None, got {self.long_video!r}; write for example dict(edit=0.05, frames=2)"
            )
        check_choice("path", self.path, PATHS)
        check_choice("sampling_grid", self.sampling_grid, SAMPLING_GRIDS)
        check_choice("prediction", self.prediction, ("auto", *PREDICTIONS))
        self._check_iddpm()
        check_choice("transform", self.transform, TRANSFORM_FORMULAS)
        if not isinstance(self.allow_change, bool):
            raise ValueError(f"allow_change must be True or False, got {self.allow_change!r}")
        check_choice("sample_method", self.sample_method, TIME_DISTRIBUTIONS)
        if self.num_sampling_steps is not None:
            check_num_steps(self.num_sampling_steps, "num_sampling_steps")
        check_num_steps(self.num_timesteps, "num_timesteps")
        if self.use_discrete_timesteps:
            set_(self, "windows", self.windows.rounded(int(self.num_timesteps)))
        set_(self, "cfg_scale", as_scales("cfg_scale", self.cfg_scale, self.windows.num_windows))
        if self.guidance.mode == "fixed":
            as_scales("guidance.scale", self.guidance.scale, self.windows.num_windows)
        if self.curriculum is not None:
            self._refuse_lists_of_scales("a curriculum merges windows")
        if self.draws.grids:
            self._refuse_lists_of_scales("draws.grids trains windows of other grids")
        for name in ("x_cond_weight", "initial_image_scale", "force_num"):
            check_number(name, getattr(self, name), low=0)
        check_number("loc", self.loc)
        for name in ("scale", "transform_scale"):
            check_number(name, getattr(self, name))
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")
        if self.uniform_over_threshold is not None:
            check_number("uniform_over_threshold", self.uniform_over_threshold, low=0)
        if self.use_discrete_timesteps and self.sample_method != "uniform":
            raise ValueError(f'use_discrete_timesteps needs sample_method="uniform", got {self.sample_method!r}')
        if self.use_discrete_timesteps and (self.draws.per_solve or 1) > 1:
            raise ValueError(
                "use_discrete_timesteps draws whole timesteps as the host does, one a solution: it needs draws.per_solve=1 or "
                f"None, got {self.draws.per_solve}"
            )
        if self.drop_condition is not None:
            known = ("null", "cond", "text", "keep")
            for key, weight in self.drop_condition.items():
                check_choice("a key of drop_condition", key, known)
                check_number(f"drop_condition[{key!r}]", weight, low=0)
            if not sum(self.drop_condition.values()) > 0:
                raise ValueError(f"drop_condition needs a positive weight, got {dict(self.drop_condition)}")

    def _check_curriculum(self) -> None:
        if not isinstance(self.curriculum, CurriculumConfig):
            known = ", ".join(f.name for f in fields(CurriculumConfig))
            raise ValueError(f"curriculum must be a dict or None, got {self.curriculum!r}; known keys: {known}")
        if self.draws.overlap > 0 or self.draws.grids:
            raise ValueError(
                "a curriculum's teacher steps from edge to edge of merged windows, which overlapping windows do not share; use "
                "draws.overlap=0 and draws.grids=()"
            )
        self.stages()

    def _refuse_lists_of_scales(self, why: str) -> None:
        fixed = self.guidance.scale if self.guidance.mode == "fixed" else None
        for name, value in (("guidance.scale", fixed), ("cfg_scale", self.cfg_scale)):
            if isinstance(value, tuple):
                raise ValueError(f"{why}, so one scale a window has no meaning, got {name}={list(value)}; give one number")

    def stages(self) -> Curriculum | None:
        """A curriculum at its beginning, if there is one."""
        stages = self.curriculum
        return None if stages is None else Curriculum(self.windows, stages.windows, stages.teacher, stages.advance)

    def _check_iddpm(self) -> None:
        check_choice("noise_schedule", self.noise_schedule, NOISE_SCHEDULES)
        check_num_steps(self.diffusion_steps, "diffusion_steps")
        check_choice("learn_sigma", self.learn_sigma, (True, False))
        if self.cfg_channel not in ("auto", None):
            check_num_steps(self.cfg_channel, "cfg_channel (or None for all channels)")
        respacing = self.timestep_respacing
        if respacing not in (None, ""):
            if not str(respacing).isdecimal():
                raise ValueError(
                    f"timestep_respacing={respacing!r} divides a diffusion into sections, which is what windows do here; write "
                    "windows=[1, ..., 0] for where steps end and num_sampling_steps for how many there are"
                )
            if self.num_sampling_steps is not None:
                raise ValueError(
                    f"timestep_respacing={respacing!r} and num_sampling_steps={self.num_sampling_steps!r} name the same "
                    "number; leave out timestep_respacing"
                )
            check_num_steps(int(respacing), "timestep_respacing")
        for name, remedy in _ONLY_FALSE.items():
            if getattr(self, name) is not False:
                raise ValueError(f"{name}={getattr(self, name)!r} is iddpm's, and perflow takes only False: {remedy}")

    @property
    def times_a_solve(self) -> int:
        """Times that one solution of the teacher feeds."""
        if self.draws.per_solve is not None:
            return int(self.draws.per_solve)
        return 1 if self.draws.edge_mass == 1 or self.use_discrete_timesteps else 2

    @property
    def teacher_steps(self) -> int:
        """The teacher's steps in each window."""
        each = self.teacher.steps_per_window
        fewest = min([self.windows.num_windows, *self.draws.grids])
        return math.ceil(8 / fewest) if each is None else int(each)

    @property
    def sampling_steps(self) -> int:
        """Number of sampling steps: num_sampling_steps (or timestep_respacing), a plan's only grid's, or one a window."""
        return self.steps_over(self.windows)

    def steps_over(self, windows: TimeWindows) -> int:
        """The same where a curriculum has come to other windows."""
        steps = self.num_sampling_steps if self.timestep_respacing in (None, "") else self.timestep_respacing
        if steps is not None:
            return int(steps)
        return len(windows.grids[0]) - 1 if len(windows.grids) == 1 else windows.num_windows


_ONLY_FALSE = {
    "use_kl": "the student's loss is chosen by `objective`",
    "rescale_learned_sigmas": "the variance is kept as the teacher's by a loss of its own (learn_sigma=True)",
    "sigma_small": "the sampler takes deterministic steps, so the size of random ones means nothing; leave it out",
    "predict_xstart": "teacher and student predict noise (`prediction`); networks that predict clean data are not supported",
}
