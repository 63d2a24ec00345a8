"""The keys of `model=dict(type="perflow_flux", perflow=dict(...))`: the recipe's, and what Open-Sora 2.0 adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

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
    shown,
    whole,
)
from opensora_perflow.method.process import Linear
from opensora_perflow.training.recipe import Recipe, refuse_list_of_scales
from opensora_perflow.training.removed import refuse_removed_keys

PROCESS = Linear(num_timesteps=1, sign=1)
"""Networks are told t itself and answer noise - data."""
WHERE = 'model=dict(type="perflow_flux", perflow=dict(...))'


@dataclass(frozen=True)
class Keys:
    """What Open-Sora 2.0 adds to a recipe."""

    flow_shift: float | None = key(None, optional(number(above=0, least=1e-3, most=1e3)))
    """The warp of time, as sampling_option.flow_shift; None: Open-Sora's formula of sizes (tokens.Layout.alpha)."""
    cfg_scale: Any = key(7.5, as_scales)
    """Guidance by text with which mode sync samples (sampling_option.guidance): student starts are guided so. A number, or one
    a window, noisiest first."""
    image_cfg_scale: float = key(3.0, number(low=0, most=MOST_SCALE))
    """As cfg_scale, by reference frames (sampling_option.guidance_img)."""
    sampling_grid: str = key("edges", choice("edges", "uniform"))
    """edges: every window edge is a sampling time. uniform: Open-Sora's own grid. The same where the number of uniform windows
    divides that of steps."""
    t2i_steps: int | None = key(50, optional(whole(high=MOST_STEPS)))
    """Steps of the image model that t2i2v begins with, for which Open-Sora takes num_steps as well. None: as Open-Sora."""

    def __post_init__(self) -> None:
        check_keys(self)


def read_config(config: Mapping[str, Any] | None) -> tuple[Recipe, Keys]:
    """The value of the key `perflow` as the method's keys and the host's.

    Raises:
        ValueError: a key that is unknown or was removed, or a value that is refused (received, accepted, remedy).
    """
    config = {} if config is None else config
    if not isinstance(config, Mapping):
        raise ValueError(
            f"perflow in {WHERE} must be a dict of PeRFlow's keys, got {shown(config)}; write perflow=dict(windows=4)"
        )
    of_recipe, of_keys = ([f.name for f in fields(cls)] for cls in (Recipe, Keys))
    refuse_removed_keys(WHERE, config)
    refuse_unknown(config, [*of_recipe, *of_keys], WHERE)
    keys = Keys(**{name: value for name, value in config.items() if name in of_keys})
    recipe = Recipe(**{name: value for name, value in config.items() if name in of_recipe})
    recipe.check_process(PROCESS)
    _refuse_keys_of_1(recipe)
    as_scales("cfg_scale", keys.cfg_scale, recipe.windows.num_windows)
    if recipe.needs_one_scale:
        refuse_list_of_scales("cfg_scale", keys.cfg_scale, recipe.needs_one_scale)
    return recipe, keys


def _refuse_keys_of_1(recipe: Recipe) -> None:
    """Raises ValueError for what Open-Sora 1.x alone can be asked for."""
    if recipe.guidance.negative is not None:
        raise ValueError(
            f"guidance.negative={recipe.guidance.negative!r} is an embedding of Open-Sora 1.x's one text encoder; 2.0 has two, "
            "and its students lead away from the empty prompt: leave the key out"
        )
    if recipe.draws.starts == "diffused" and recipe.draws.overlap > 0:
        raise ValueError(
            f'draws.overlap={recipe.draws.overlap:g} with starts="diffused": Open-Sora 2.0 hands over noised data, which may '
            'have more noise than the start of an overlapping window; use starts="student", or overlap=0'
        )
    if recipe.draws.starts == "diffused" and recipe.draws.shares:
        raise ValueError(
            f'draws.shares={list(recipe.draws.shares)} with starts="diffused": windows are those that the times of Open-Sora '
            '2.0\'s train.py lie in; use starts="student", or leave the key out'
        )
