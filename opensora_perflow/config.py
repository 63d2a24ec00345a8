"""The scheduler's config, validated: every key, its default and its meaning in one place."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from opensora_perflow.paths import NOISE_SCHEDULES
from opensora_perflow.predictions import PREDICTIONS
from opensora_perflow.schedule import POSITION_DISTRIBUTIONS, TIME_DISTRIBUTIONS, check_num_steps
from opensora_perflow.solvers import SOLVERS
from opensora_perflow.windows import TimeWindows

GUIDANCE_MODES = ("sync", "fixed")
STARTS = ("diffused", "student", "mixed")
TRANSFORM_FORMULAS = ("auto", "v1.2", "v1.3")
PATHS = ("auto", "linear", "ddpm")
PATH_KEYS = {
    "linear": (
        "window_time",
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
        "variance_weight",
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


@dataclass(frozen=True)
class TeacherConfig:
    """Where the frozen teacher comes from and how its ODE is solved."""

    from_pretrained: str | None = None
    """Checkpoint: an Open-Sora checkpoint folder, a .safetensors / .pt / .pth / .bin file, or a Hugging Face repository id.
    None: a copy of the student's own weights at the first training step (of a run that was not resumed)."""
    steps_per_window: int = 8
    """ODE steps that the teacher takes in each window, >= 1."""
    solver: str = "euler"
    """euler (1 evaluation a step), heun or midpoint (2)."""
    allow_distilled: bool = False
    """Accept weights that are themselves a PeRFlow student, as a later stage wants. Never assumed."""

    def __post_init__(self) -> None:
        if self.from_pretrained is not None and not isinstance(self.from_pretrained, (str, os.PathLike)):
            raise ValueError(f"teacher.from_pretrained must be a path, a repository id or None, got {self.from_pretrained!r}")
        check_num_steps(self.steps_per_window, "teacher.steps_per_window")
        check_choice("teacher.solver", self.solver, tuple(SOLVERS))
        if not isinstance(self.allow_distilled, bool):
            raise ValueError(f"teacher.allow_distilled must be True or False, got {self.allow_distilled!r}")


@dataclass(frozen=True)
class GuidanceConfig:
    """Where classifier-free guidance happens."""

    mode: str = "sync"
    """sync: the student learns the unguided flow, with text dropout, and is guided when sampled (2 evaluations a step).
    fixed: the teacher is guided with `scale`, the student learns the result and is sampled without guidance (1 a step)."""
    scale: float | None = None
    """Text guidance of the teacher in mode fixed; 1 = a teacher that needs none (itself a student of mode fixed)."""
    image_scale: float | None = None
    """Guidance by reference frames in mode fixed (Open-Sora 1.3's image/video conditioning); None: `scale`."""

    def __post_init__(self) -> None:
        check_choice("guidance.mode", self.mode, GUIDANCE_MODES)
        if self.mode == "fixed":
            if self.scale is None:
                raise ValueError('guidance mode "fixed" needs a scale, for example dict(mode="fixed", scale=7.0)')
            check_number("guidance.scale", self.scale, low=0)
            if self.image_scale is not None:
                check_number("guidance.image_scale", self.image_scale, low=0)
        elif self.scale is not None or self.image_scale is not None:
            raise ValueError(
                f'guidance mode "sync" takes no scale, got scale={self.scale!r}, image_scale={self.image_scale!r}; '
                'set cfg_scale for sampling, or mode="fixed" to fold the scale into the student'
            )


@dataclass(frozen=True)
class DrawsConfig:
    """What the student is trained on: where windows start, and at which times inside them."""

    starts: str = "diffused"
    """diffused: data with noise. student: states that the student itself reaches from noise, one step a window, guided as
    it is sampled; no data is used, only its shape. mixed: `student_share` of the samples start there."""
    student_share: float = 0.5
    """Share of starts="mixed" that the student reaches, 0..1; no effect otherwise."""
    distribution: str = "host"
    """Times inside a window. host: the time that sample_method drew; uniform: evenly over the untransformed window; beta."""
    beta: Any = (2.0, 1.0)
    """Parameters (a, b) > 0 of distribution="beta", from the window's clean edge to its noisy one: a > b leans to noise."""
    edge_mass: float = 0.0
    """Share of the times exactly at the window's noisy edge, 0..1."""
    per_solve: int = 1
    """Times that one solution of the teacher feeds, >= 1. Each is an evaluation of the student, its gradient included; the
    loss is their mean (weighted by edge_mass). The first follows `distribution`; with "host" the others are uniform."""

    def __post_init__(self) -> None:
        check_choice("draws.starts", self.starts, STARTS)
        check_number("draws.student_share", self.student_share, low=0, high=1)
        check_choice("draws.distribution", self.distribution, ("host", *POSITION_DISTRIBUTIONS))
        beta = self.beta
        pair = isinstance(beta, Sequence) and not isinstance(beta, str) and len(beta) == 2
        if not pair or not all(isinstance(v, Real) and not isinstance(v, bool) and v > 0 for v in beta):
            raise ValueError(f"draws.beta must be two numbers > 0, got {beta!r}; write for example (2, 1)")
        object.__setattr__(self, "beta", (float(beta[0]), float(beta[1])))
        check_number("draws.edge_mass", self.edge_mass, low=0, high=1)
        check_num_steps(self.per_solve, "draws.per_solve")
        if self.edge_mass == 1 and self.per_solve > 1:
            raise ValueError(
                f"draws.edge_mass=1 leaves one time in a window, got per_solve={self.per_solve!r}; use per_solve=1 or less mass"
            )


@dataclass(frozen=True)
class PeRFlowConfig:
    """All keys of `scheduler=dict(type="perflow", ...)`.

    The second half are the keys of Open-Sora's rflow with their upstream meaning, so that an existing config switches by its
    `type` alone.
    """

    windows: Any = 4
    """Number K >= 1 of uniform windows; a descending list of edges from 1 to 0 in untransformed time; or the file that
    `opensora-perflow plan` wrote (a name that ends in .json), whose sampling grids then serve the step counts they are for."""
    window_time: str = "host"
    """host: edges pass through the host's timestep transform, per sample; flow: edges are flow times as they stand."""
    path: str = "auto"
    """What the network was trained on. linear: rectified flow (rflow); ddpm: a diffusion, epsilon and usually a learned
    variance (iddpm; dpm-solver samples the same networks). auto: the one whose keys are in this config (see PATH_KEYS), else
    what the host and its network allow (see hosts/host_path.py)."""
    prediction: str = "auto"
    """What the student's network outputs: velocity; or, on the ddpm path, ddim_eps or diff_eps too, see predictions.py.
    auto: velocity on the linear path, ddim_eps on the ddpm path. Sample with what was trained."""
    variance_weight: float = 1.0
    """ddpm path: loss weight that keeps the network's variance half as the teacher's, so that iddpm can sample the student
    too; costs one evaluation of the teacher a training step. 0: off. No effect with prediction="velocity", which iddpm cannot
    sample anyway."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    draws: DrawsConfig = field(default_factory=DrawsConfig)
    objective: Any = "perflow"
    """Name of a registered objective, dict(type=name, weight=1.0, its keywords), or a list of those, which are added."""
    transform: str = "auto"
    """Which host's timestep transform: v1.2 and v1.3 count latent frames differently. auto: the installed host's."""

    num_sampling_steps: int | None = None
    """Sampling steps, >= 1; None: one a window, or those of the only grid in the plan that `windows` names. A multiple of the
    number of windows serves every window alike."""
    num_timesteps: int = 1000
    """Size of the network's timestep range."""
    cfg_scale: float = 4.0
    """Guidance when sampling in mode sync; no effect in mode fixed."""
    use_discrete_timesteps: bool = False
    """Round drawn times and the sampling grid to whole timesteps."""
    use_timestep_transform: bool = False
    """Warp time by resolution and length."""
    sample_method: str = "uniform"
    """Distribution of the training times: uniform or logit-normal."""
    loc: float = 0.0
    """Mean of the logit-normal's normal."""
    scale: float = 1.0
    """Standard deviation of the logit-normal's normal, > 0."""
    transform_scale: float = 1.0
    """Factor on the warp's ratio, > 0: for drawn times only under v1.2, for sampling (and windows) only under v1.3."""
    scale_temporal: bool = True
    """False: the warp ignores the number of frames (v1.3)."""
    uniform_over_threshold: float | None = None
    """Drawn flow times of videos above this are drawn again uniformly between it and 1 (v1.3)."""
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
    """iddpm: False says that the network has no variance half worth keeping."""
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
        check_choice("window_time", self.window_time, ("host", "flow"))
        check_choice("path", self.path, PATHS)
        check_choice("prediction", self.prediction, ("auto", *PREDICTIONS))
        self._check_iddpm()
        check_choice("transform", self.transform, TRANSFORM_FORMULAS)
        check_choice("sample_method", self.sample_method, TIME_DISTRIBUTIONS)
        if self.num_sampling_steps is not None:
            check_num_steps(self.num_sampling_steps, "num_sampling_steps")
        check_num_steps(self.num_timesteps, "num_timesteps")
        for name in ("cfg_scale", "x_cond_weight", "initial_image_scale", "force_num"):
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
        if self.use_discrete_timesteps and (self.draws.distribution != "host" or self.draws.per_solve > 1):
            raise ValueError(
                'use_discrete_timesteps draws whole timesteps as the host does: it needs draws with distribution="host" and '
                f"per_solve=1, got {self.draws.distribution!r} and {self.draws.per_solve}"
            )
        if self.drop_condition is not None:
            known = ("null", "cond", "text", "keep")
            for key, weight in self.drop_condition.items():
                check_choice("a key of drop_condition", key, known)
                check_number(f"drop_condition[{key!r}]", weight, low=0)
            if not sum(self.drop_condition.values()) > 0:
                raise ValueError(f"drop_condition needs a positive weight, got {dict(self.drop_condition)}")

    def _check_iddpm(self) -> None:
        check_choice("noise_schedule", self.noise_schedule, NOISE_SCHEDULES)
        check_num_steps(self.diffusion_steps, "diffusion_steps")
        check_number("variance_weight", self.variance_weight, low=0)
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
    def sampling_steps(self) -> int:
        """Number of sampling steps: num_sampling_steps (or timestep_respacing), a plan's only grid's, or one a window."""
        steps = self.num_sampling_steps if self.timestep_respacing in (None, "") else self.timestep_respacing
        if steps is not None:
            return int(steps)
        grids = self.windows.grids
        return len(grids[0]) - 1 if len(grids) == 1 else self.windows.num_windows


_ONLY_FALSE = {
    "use_kl": "the student's loss is chosen by `objective`",
    "rescale_learned_sigmas": "the variance is kept as the teacher's, with the weight `variance_weight`",
    "sigma_small": "the sampler takes deterministic steps, so the size of random ones means nothing; leave it out",
    "predict_xstart": "teacher and student predict noise (`prediction`); networks that predict clean data are not supported",
}
