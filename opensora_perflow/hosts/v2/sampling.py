"""Sampling students in Open-Sora 2.0's own denoisers: one row where they ask for three, and the times that were trained."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opensora_perflow.conventions import shift_time
from opensora_perflow.hosts.v2.keys import Keys
from opensora_perflow.method.grids import sampling_grid
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.training.recipe import Guidance, Recipe
from opensora_perflow.training.state import StudentState

SAME = 1e-5
"""How far Open-Sora's float32 times may be from ours and still be the same."""


@dataclass(frozen=True)
class SamplingSettings:
    """What a student is sampled by.

    grids: Numbers of steps whose uniform grids it was trained for as well.
    scale, image_scale: Guidance by which the student came to its starts, see state.StudentState.cfg_scale; None: not known.
    two_time: Is the network told the length of its step?
    """

    recipe: Recipe
    keys: Keys
    windows: TimeWindows
    grids: tuple[int, ...] = ()
    scale: float | tuple[float, ...] | None = None
    image_scale: float | None = None
    two_time: bool = False

    @classmethod
    def of(cls, recipe: Recipe, keys: Keys) -> SamplingSettings:
        return cls(recipe, keys, recipe.windows, recipe.draws.grids, two_time=recipe.draws.two_time)

    def as_trained(self, given: Collection[str], state: StudentState, where: str | os.PathLike) -> SamplingSettings:
        """These settings, with windows, guidance and flow_shift as a student was trained, where the config does not name them.

        Raises:
            ValueError: the state was not written by a run of Open-Sora 2.0, or its guidance is none.
        """
        transform = state.transform or {}
        if transform.get("formula") != "v2.0":
            raise ValueError(f"{where} belongs to a student of Open-Sora 1.x, whose weights do not fit 2.0's network")
        windows = self.windows if "windows" in given else TimeWindows(state.windows)
        try:
            guidance = self.recipe.guidance
            if "guidance" not in given:
                guidance = Guidance.recorded(state.guidance, windows.num_windows)
            grids = tuple(int(steps) for steps in state.draws.get("grids") or ())
            recipe = Recipe(windows=windows, guidance=guidance)
            keys = self.keys if "flow_shift" in given else replace(self.keys, flow_shift=transform.get("flow_shift"))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{where} does not go with the config's perflow: {error}") from error
        scales = (None, None) if guidance.folded else (state.cfg_scale, state.image_cfg_scale)
        return SamplingSettings(recipe, keys, windows, grids, *scales, bool(state.draws.get("two_time")))

    def times(self, asked: Sequence[float], alpha: float) -> tuple[list[float], list[tuple[int, str]]]:
        """The times of as many steps as Open-Sora asks for, and what the log should say.

        Args:
            asked: Open-Sora's own times, from 1 to 0, warped.
            alpha: The warp that the student was trained with, see tokens.alphas.
        """
        steps, count = len(asked) - 1, self.windows.num_windows
        uniform = self.keys.sampling_grid == "uniform" or steps in self.grids
        grid = sampling_grid(TimeWindows.uniform(1) if uniform else self.windows, steps)
        times = shift_time(torch.tensor(grid, dtype=torch.float64), alpha).tolist()
        said = []
        if steps < count and steps not in self.grids and self.windows.grid_of(steps) is None:
            said.append(
                (
                    logging.WARNING,
                    f"{steps} sampling steps for {count} windows: steps cross edges of windows, which the student never "
                    f"learned; set sampling_option.num_steps={count}, or a multiple",
                )
            )
        if max(abs(one - other) for one, other in zip(times, asked)) <= SAME:
            return list(asked), said
        if self.windows.is_uniform and steps % count == 0:
            said.append(
                (
                    logging.WARNING,
                    f"Open-Sora's times ({_listed(asked)}) are not those that the student was trained for ({_listed(times)}), "
                    f"which are taken. Use sampling_option.shift=True and flow_shift={self.keys.flow_shift}",
                )
            )
        else:
            said.append((logging.INFO, f"PeRFlow samples at the times {_listed(times)}"))
        return times, said

    def other_guidance(self, text: float, image: float | None) -> list[tuple[int, str]]:
        """A warning where a student of mode sync is sampled with other guidance than led to its starts in training.

        Args:
            text: sampling_option.guidance.
            image: sampling_option.guidance_img; None: no reference frames.
        """
        said = []
        for name, key, now, trained in (
            ("guidance", "cfg_scale", text, self.scale),
            ("guidance_img", "image_cfg_scale", image, self.image_scale),
        ):
            scales = trained if isinstance(trained, tuple) else (trained,)
            if None not in (now, trained) and {now} != set(scales):
                listed = ", ".join(f"{scale:g}" for scale in dict.fromkeys(scales))
                said.append(
                    (
                        logging.WARNING,
                        f"the student is sampled with sampling_option.{name}={now:g}, and was trained on the states that "
                        f"guidance {listed} leads to; sample with that, train with perflow=dict({key}={now:g}), or mode range",
                    )
                )
        return said


def step_at(times: Sequence[float], t: Tensor) -> Tensor:
    """Lengths of the steps of a grid that begin at times t [B], which the network's precision has rounded."""
    grid = torch.tensor(times, dtype=torch.float64, device=t.device)
    place = (grid[:-1, None] - t.double()).abs().argmin(dim=0)
    return grid[place] - grid[place + 1]


def _listed(times: Sequence[float]) -> str:
    shown = [f"{time:.3g}" for time in times[:6]]
    return ", ".join(shown + ["..."] * (len(times) > 6))


def one_row(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The first third of the rows that Open-Sora's image-to-video denoiser asks for, and 3; other calls as they are, and 1.

    Its rows are [text, negative, negative without reference] of the same states. A student whose guidance is in its weights
    answers the first. The denoiser then guides three equal answers, which leaves them as they are, whatever its scales.
    """
    img = arguments["img"]
    third = len(img) // 3
    if len(img) % 3 or not all(torch.equal(img[:third], img[k * third : (k + 1) * third]) for k in (1, 2)):
        return dict(arguments), 1
    rows = len(img)
    return {name: value[:third] if _batched(value, rows) else value for name, value in arguments.items()}, 3


def _batched(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


def other_steps(asked: Sequence[float], steps: int, alpha: float) -> list[float]:
    """Open-Sora's own times for another number of steps, with the warp that the asked ones have; `alpha`: if they tell none."""
    if len(asked) > 2:
        u, t = 1 - 1 / (len(asked) - 1), asked[1]
        alpha = t * (1 - u) / (u * (1 - t))
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), alpha).tolist()
