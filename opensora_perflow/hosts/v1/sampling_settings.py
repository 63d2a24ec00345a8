"""What a network is sampled with: what the state beside its weights says, wherever the config says nothing else."""

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opensora_perflow.checks import as_scales
from opensora_perflow.hosts.v1.keys import Keys
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.training.recipe import Guidance, Recipe
from opensora_perflow.training.state import StudentState, raw_weights, sampling_mismatch


@dataclass(frozen=True)
class SamplingSettings:
    """A config as the sampler takes it.

    windows: The recipe's, or those of a curriculum's stage.
    grids: Numbers of steps whose uniform grids the student was trained for as well, see recipe.Draws.
    scale: Guidance by which the student came to its starts, see state.StudentState.cfg_scale; None: not known.
    two_time: Is the network told the length of its step?
    """

    recipe: Recipe
    keys: Keys
    windows: TimeWindows
    grids: tuple[int, ...] = ()
    scale: float | tuple[float, ...] | None = None
    two_time: bool = False

    @property
    def num_steps(self) -> int:
        return self.keys.steps_over(self.windows)

    @property
    def crossing(self) -> list[str]:
        """A warning where steps cross edges of windows and nothing was trained or planned for that."""
        steps, count = self.num_steps, self.windows.num_windows
        if steps >= count or steps in self.grids or self.windows.grid_of(steps) is not None:
            return []
        step, window = ("step", "window") if steps == 1 else ("steps", "windows")
        return [
            f"{steps} sampling {step} for {count} windows: steps cross edges of windows, which the student never learned, "
            "and samples end further from the teacher's: 2.8 times as far with 2 steps for 4 windows on the mixture of "
            f"benchmarks/. Set num_sampling_steps={count}, or train a student of {steps} {window} (stage 3, curriculum)"
        ]

    def other_scale(self, asked: float | Sequence[float] | None) -> list[str]:
        """A warning where a call asks for another guidance than the student came to its starts by; `asked` None: cfg_scale."""
        if self.scale is None:
            return []
        now, trained = (self.keys.scales(scale, self.windows.num_windows) for scale in (asked, self.scale))
        if now == trained:
            return []
        now, trained = (", ".join(f"{scale:g}" for scale in dict.fromkeys(scales)) for scales in (now, trained))
        return [
            f"the student is sampled with guidance {now}, and was trained on the states that guidance {trained} leads to; "
            "leave out cfg_scale, or train with the scale that is sampled (mode range serves many)"
        ]

    def report(self, found: StudentState, now: StudentState, where: str | os.PathLike) -> list[tuple[int, str]]:
        """Levels and texts of what the log should say of a student's state `found`, when it is sampled as `now`."""
        text = (
            f"PeRFlow samples with {self.windows.num_windows} windows, {self.num_steps} steps and guidance mode "
            f"{self.recipe.guidance.mode}; what the scheduler's config leaves out is from {where}"
        )
        mismatch, raw = sampling_mismatch(found, now, where), raw_weights(Path(where).parent)
        remedy = "windows, guidance and prediction are as trained where the scheduler's config leaves them out"
        warnings = [mismatch and f"{mismatch}; {remedy}", raw]
        return [(logging.INFO, text), *((logging.WARNING, warning) for warning in warnings if warning)]


def as_trained(
    config: SamplingSettings,
    given: Collection[str],
    stages: Sequence[TimeWindows],
    state: StudentState,
    where: str | os.PathLike,
) -> SamplingSettings:
    """A config, with windows, guidance, prediction and path as a student was trained, where the config does not name them.

    The same holds for cfg_scale in mode sync.

    Args:
        config: The config alone.
        given: The keys that it names.
        stages: Windows of its curriculum's stages; a checkpoint of one of them has that stage's.
        state, where: Of the weights, and the file that it is in.

    Raises:
        ValueError: the state holds a guidance that is none, or cfg_scale is a list of another length than the windows.
    """
    staged = any(windows.edges == state.windows for windows in stages)
    windows = config.windows if "windows" in given and not staged else TimeWindows(state.windows)
    path = state.path if config.keys.path == "auto" else config.keys.path
    try:
        grids = tuple(int(steps) for steps in state.draws.get("grids") or ())
        recipe = _trained_recipe(config.recipe, "guidance" in given, state, path, windows)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{where} does not go with the scheduler's config: {error}") from error
    as_scales(f"cfg_scale (windows as in {where})", config.keys.cfg_scale, windows.num_windows)
    scale = None if recipe.guidance.folded else _scale_of(state, windows.num_windows)
    told_scale = scale is None or "cfg_scale" in given
    keys = replace(config.keys, path=path, cfg_scale=config.keys.cfg_scale if told_scale else scale)
    if "sampling_grid" not in given and keys.steps_over(windows) in grids:
        keys = replace(keys, sampling_grid="uniform")
    return SamplingSettings(recipe, keys, windows, grids, scale, bool(state.draws.get("two_time")))


def _trained_recipe(recipe: Recipe, guided: bool, state: StudentState, path: str, windows: TimeWindows) -> Recipe:
    """What a sampler reads of a recipe. `guided`: The config names the guidance."""
    guidance, prediction = recipe.guidance, recipe.prediction
    if not guided and "mode" in state.guidance:
        guidance = Guidance.recorded(state.guidance, windows.num_windows)
    if prediction == "auto" and path == state.path:
        prediction = state.prediction
    return Recipe(windows=windows, guidance=guidance, prediction=prediction)


def _scale_of(state: StudentState, num_windows: int) -> float | tuple[float, ...] | None:
    """The cfg_scale that a student of mode sync was trained for; None where none is known for so many windows."""
    scale = state.cfg_scale
    return None if isinstance(scale, tuple) and len(scale) != num_windows else scale
