"""The host's keys: those that Open-Sora's rflow and iddpm have, and what sampling inside Open-Sora adds to them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from opensora_perflow.checks import (
    MOST_SCALE,
    MOST_STEPS,
    as_scales,
    check_keys,
    choice,
    key,
    number,
    optional,
    refuse_unknown,
    section,
    switch,
    whole,
)
from opensora_perflow.hosts.v1.key_kinds import channels, only_false, respacing, weights
from opensora_perflow.hosts.v1.timestep_transform import installed_formula, shift_ratio
from opensora_perflow.method.ddpm import NOISE_SCHEDULES
from opensora_perflow.method.grids import sampling_grid
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.training.recipe import Recipe, refuse_list_of_scales
from opensora_perflow.training.removed import refuse_removed_keys

logger = logging.getLogger("opensora_perflow")

SAMPLING_GRIDS = ("edges", "uniform")
TRANSFORM_FORMULAS = ("auto", "v1.2", "v1.3")
PATHS = ("auto", "linear", "ddpm")
TIME_DISTRIBUTIONS = ("uniform", "logit-normal")
WITHOUT_EFFECT = ("sample_method", "loc", "scale", "uniform_over_threshold")
"""Keys by which Open-Sora chooses training times."""

MOST_TIMESTEPS = 100_000
"""Size of a network's timestep range."""

_rflow, _iddpm = partial(key, path="linear"), partial(key, path="ddpm")
"""Keys of Open-Sora's rflow, or of its iddpm, that only one path has. All others belong to both."""


@dataclass(frozen=True)
class LongVideoConfig:
    """How the clips of a long video (Open-Sora's `loop`) are joined at the frames that they share, in every clip that has
    reference frames. Those come back as they were given."""

    edit: float = key(0.05, number(low=0, high=1))
    """Reference frames of edit ratio 0 are made anew from this flow time on while the others are generated, 0..1; 0 keeps them.
    Between two grid points it costs an evaluation a clip; 0.75 is one of 4 uniform windows. Small values change little; 0.75
    softened the seams of one model and broke another's (benchmarks/README.md). No effect with mask_index (v1.3), where the
    network makes them anew anyway."""
    frames: int = key(2, whole(0))
    """Latent frames beside reference frames over which the difference is faded out, >= 0; see long_video.py."""

    def __post_init__(self) -> None:
        check_keys(self, "long_video.")


@dataclass(frozen=True)
class Keys:
    """What the host's scripts and networks add to a recipe."""

    path: str = key("auto", choice(*PATHS))
    """What the network was trained on. linear: rectified flow (rflow); ddpm: a diffusion with epsilon and usually a learned
    variance (iddpm; dpm-solver samples the same networks). auto: the path whose keys are in this config (see PATH_KEYS).
    Without such keys, what the host and its network allow (see iddpm.find_process)."""
    transform: str = _rflow("auto", choice(*TRANSFORM_FORMULAS))
    """Which host's timestep transform: v1.2 and v1.3 count latent frames differently. auto: the installed host's."""

    long_video: LongVideoConfig | None = key(None, section(LongVideoConfig, none=True, example="dict(edit=0.05, frames=2)"))
    """dict(edit=0.05, frames=2): smoother, less repetitive long videos, see LongVideoConfig. None: join clips as upstream."""

    num_sampling_steps: int | None = key(None, optional(whole(high=MOST_STEPS)))
    """Sampling steps, >= 1; None: one a window, or those of the only grid in the plan that `windows` names. A multiple of the
    number of windows serves every window alike."""
    sampling_grid: str = key("edges", choice(*SAMPLING_GRIDS))
    """edges: every window edge is a sampling time. The steps left over go to the noisiest windows, or where the plan of
    `windows` has them. uniform: the host's own grid 1, 1 - 1/N, ..., whose steps may cross an edge. The same where the number
    of windows divides that of steps."""
    num_timesteps: int = _rflow(1000, whole(high=MOST_TIMESTEPS))
    """Size of the network's timestep range."""
    cfg_scale: Any = key(4.0, as_scales)
    """Guidance when sampling in mode sync. In mode range, the scale that the student is told, which lies in the range. A
    number, or a list of one a window, noisiest first. No effect in mode fixed."""
    use_discrete_timesteps: bool = _rflow(False, switch)
    """Round drawn times, window edges and the sampling grid to whole timesteps."""
    use_timestep_transform: bool = _rflow(False, switch)
    """Warp time by resolution and length."""
    sample_method: str = _rflow("uniform", choice(*TIME_DISTRIBUTIONS))
    """Open-Sora's distribution of training times, uniform or logit-normal. No effect: windows are drawn equally often,
    or by draws.shares, and times evenly inside them."""
    loc: float = _rflow(0.0, number())
    """As sample_method: no effect."""
    scale: float = _rflow(1.0, number(above=0))
    """As sample_method: no effect."""
    transform_scale: float = _rflow(1.0, number(above=0, least=1e-3, most=1e3))
    """Factor on the warp's ratio, > 0, in sampling and windows under v1.3. Under v1.2, which warps drawn times by the
    factor, no effect."""
    scale_temporal: bool = _rflow(True, switch)
    """False: the warp ignores the number of frames (v1.3)."""
    uniform_over_threshold: float | None = _rflow(None, optional(number(low=0)))
    """As sample_method: no effect (v1.3)."""
    drop_condition: Mapping[str, float] | None = _rflow(None, optional(weights))
    """Weights of null / cond / text / keep for image and video conditioning in mode sync (v1.3); None: always keep."""
    x_cond_weight: float = _rflow(1.0, number(low=0))
    """Loss weight of the conditioned frames (v1.3)."""
    use_oscillation_guidance: bool = _rflow(False, switch)
    """Guidance on even steps only, after the first force_num (v1.3)."""
    force_num: int = _rflow(10, whole(0))
    """Guided steps before the oscillation begins."""
    use_flaw_fix: bool = _rflow(False, switch)
    """Rescale the guided prediction's standard deviation (v1.3)."""
    scale_image_weight: bool = _rflow(False, switch)
    """Image guidance decays over the steps and grows over the frames (v1.3)."""
    initial_image_scale: float = _rflow(1.0, number(low=0, most=MOST_SCALE))
    """Where scale_image_weight decays to."""

    cfg_channel: int | str | None = _iddpm("auto", channels)
    """iddpm: guidance acts on the first so many channels; None: on all. auto: 3 under Open-Sora 1.0, which knows no other;
    all under later ones."""
    timestep_respacing: str | int | None = _iddpm(None, respacing)
    """iddpm's other name of num_sampling_steps; "" and None leave that to num_sampling_steps."""
    noise_schedule: str = _iddpm("linear", choice(*NOISE_SCHEDULES))
    """iddpm: linear or squaredcos_cap_v2, see ddpm.alpha_bars."""
    diffusion_steps: int = _iddpm(1000, whole(high=MOST_TIMESTEPS))
    """iddpm: size of the network's timestep range."""
    learn_sigma: bool = _iddpm(True, switch)
    """iddpm: True keeps the network's variance half as the teacher's, so that iddpm can sample the student too. The cost is an
    evaluation of the teacher for each time that is trained. False: there is none worth keeping. With prediction="velocity": no
    effect."""
    sigma_small: bool = _iddpm(False, only_false)
    """iddpm; only False."""
    predict_xstart: bool = _iddpm(False, only_false)
    """iddpm; only False."""
    use_kl: bool = _iddpm(False, only_false)
    """iddpm; only False."""
    rescale_learned_sigmas: bool = _iddpm(False, only_false)
    """iddpm; only False."""

    def __post_init__(self) -> None:
        check_keys(self)
        if self.use_discrete_timesteps and self.sample_method != "uniform":
            raise ValueError(f'use_discrete_timesteps needs sample_method="uniform", got {self.sample_method!r}')
        if self.timestep_respacing and self.num_sampling_steps is not None:
            raise ValueError(
                f"timestep_respacing={self.timestep_respacing!r} and num_sampling_steps={self.num_sampling_steps!r} name the "
                "same number; leave out timestep_respacing"
            )
        if self.noise_schedule == "linear" and self.diffusion_steps <= 20:
            raise ValueError(
                f'diffusion_steps must be > 20 with noise_schedule="linear", whose last beta is 20 / diffusion_steps, got '
                f"{self.diffusion_steps}; use that of the network, usually 1000"
            )

    def say_what_has_no_effect(self) -> None:
        """Name in the log the host's keys that choose training times: perflow draws its own."""
        defaults = {f.name: f.default for f in fields(self)}
        idle = [name for name in WITHOUT_EFFECT if getattr(self, name) != defaults[name]]
        if idle:
            logger.info(
                "PeRFlow draws windows equally often, or by draws.shares, and times evenly inside them: %s %s no effect",
                ", ".join(idle),
                "has" if len(idle) == 1 else "have",
            )

    @property
    def formula(self) -> str:
        """Whose timestep transform: "v1.2" or "v1.3"."""
        return installed_formula() if self.transform == "auto" else self.transform

    @property
    def window_scale(self) -> float:
        """Factor on the ratio by which windows and sampling times are warped."""
        # v1.2 applies transform_scale when it draws training times, v1.3 when it samples (HOST: rf/__init__.py of each tag).
        return self.transform_scale if self.formula == "v1.3" else 1.0

    def window_ratio(self, model_args: Mapping[str, Any]) -> Tensor | None:
        """The host's sampler's warp [B], of windows too, so that windows hold whole sampling steps; None: none."""
        if not self.use_timestep_transform:
            return None
        return shift_ratio(model_args, self.formula, scale=self.window_scale, scale_temporal=self.scale_temporal)

    def transform_state(self) -> dict[str, Any] | None:
        """What perflow.json says of the warp; None without."""
        if not self.use_timestep_transform:
            return None
        return {"formula": self.formula, "scale": self.window_scale, "scale_temporal": self.scale_temporal}

    def steps_over(self, windows: TimeWindows) -> int:
        """Number of sampling steps: num_sampling_steps (or timestep_respacing), a plan's only grid's, or one a window."""
        steps = self.timestep_respacing or self.num_sampling_steps
        if steps is not None:
            return steps
        return len(windows.grids[0]) - 1 if len(windows.grids) == 1 else windows.num_windows

    def grid(self, windows: TimeWindows) -> tuple[float, ...]:
        """The sampler's times, untransformed, from 1 to 0."""
        # With one window there is no edge to meet: the host's own grid.
        met = windows if self.sampling_grid == "edges" else TimeWindows.uniform(1)
        grid = sampling_grid(met, self.steps_over(windows))
        if not self.use_discrete_timesteps:
            return grid
        return tuple(round(u * self.num_timesteps) / self.num_timesteps for u in grid)

    def scales(self, asked: float | Sequence[float] | None, num_windows: int) -> tuple[float, ...]:
        """The guidance scale of each window when sampling; `asked` wins over cfg_scale."""
        scales = self.cfg_scale if asked is None else as_scales("guidance_scale", asked, num_windows)
        return scales if isinstance(scales, tuple) else (scales,) * num_windows


PATH_KEYS = {path: tuple(f.name for f in fields(Keys) if f.metadata.get("path") == path) for path in ("linear", "ddpm")}
"""Keys that only one path has."""


def path_of_keys(config: Mapping[str, Any]) -> str:
    """The path that a config names: by its key `path`, or by keys that only rflow or only iddpm has; else "auto".

    A config that replaced type="iddpm" or type="rflow" by "perflow" usually carries such keys.

    Raises:
        ValueError: keys of both, or keys of one and `path` naming the other.
    """
    named = choice(*PATHS)("path", config.get("path", "auto"))
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


def read_config(config: Mapping[str, Any]) -> tuple[Recipe, Keys]:
    """A scheduler's config as the method's keys and the host's.

    Raises:
        ValueError: a key that is unknown or was removed, or a value that is refused (received, accepted, remedy).
    """
    where = 'scheduler=dict(type="perflow")'
    of_recipe, of_keys = ([f.name for f in fields(cls)] for cls in (Recipe, Keys))
    refuse_removed_keys(where, config)
    refuse_unknown(config, [*of_recipe, *of_keys], where)
    keys = Keys(**{**{key: value for key, value in config.items() if key in of_keys}, "path": path_of_keys(config)})
    recipe = Recipe(**{key: value for key, value in config.items() if key in of_recipe})
    if keys.use_discrete_timesteps:
        if (recipe.draws.per_solve or 1) > 1:
            raise ValueError(
                "use_discrete_timesteps draws whole timesteps as the host does, one a solution: it needs draws.per_solve=1 or "
                f"None, got {recipe.draws.per_solve}"
            )
        if recipe.draws.shares:
            raise ValueError(
                "use_discrete_timesteps draws windows by the timesteps that they hold, and draws.shares draws them otherwise; "
                "leave one of them out"
            )
        recipe = replace(recipe, windows=recipe.windows.rounded(keys.num_timesteps))
    as_scales("cfg_scale", keys.cfg_scale, recipe.windows.num_windows)
    if recipe.needs_one_scale:
        refuse_list_of_scales("cfg_scale", keys.cfg_scale, recipe.needs_one_scale)
    return recipe, keys
