"""The players of one batch of Open-Sora 2.0: its MMDiT under text, reference frames and guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.v2.evaluation import Evaluation
from opensora_perflow.hosts.v2.keys import PROCESS, Keys
from opensora_perflow.hosts.v2.network import Told, call_as_asked, call_without_gradient, network_output, rows_of
from opensora_perflow.hosts.v2.tokens import Layout
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.training.adapters import adapters_off
from opensora_perflow.training.players import Player
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.teacher import Teacher


@dataclass(frozen=True)
class TrainingPlayers:
    """Student and teacher of one training batch.

    network: The student, bare. told, layout, dtype: What networks are told, see `network.network_output`.
    teacher_now: Asked at every use, since a curriculum changes its teacher.
    route: Drawn.route, where the student is told the lengths of its steps.
    """

    network: nn.Module
    told: Told
    layout: Layout
    dtype: torch.dtype
    recipe: Recipe
    keys: Keys
    teacher_now: Callable[[], Teacher]
    route: Tensor | None = None
    process, prediction, moving, separable = PROCESS, "velocity", None, True

    @cached_property
    def evaluation(self) -> Evaluation:
        return Evaluation(self._output(self.network, self.told), self.told, self.layout)

    @cached_property
    def student(self) -> Player:
        return replace(_player(self.evaluation), two_time=self.route is not None)

    def sampled(self, window: int, rows: Tensor | None = None) -> Velocity:
        told = self.told if rows is None else rows_of(self.told, rows)
        guided: dict[str, Any] = {}
        if not self.recipe.guidance.folded:
            text = self.keys.cfg_scale
            text = text[window] if isinstance(text, tuple) else text
            guided = {"text_scale": text, "image_scale": self.keys.image_cfg_scale}
        player = _player(self._output(self.network, told, **guided))
        if self.route is None:
            return player.velocity(None)  # rectified flows do not ask for windows
        step = self.route[window : window + 2] if rows is None else self.route[window : window + 2, rows]
        return replace(player, two_time=True).velocity(lambda t: (step[0], step[1]))

    def teacher(self, scale: float | Tensor) -> Player:
        guidance, teacher = self.recipe.guidance, self.teacher_now()
        image_scale = scale if guidance.image_scale is None else guidance.image_scale
        if teacher.is_student:  # its guidance is folded in, and it is told a scale as the student is
            scale = image_scale = 1.0
        return _player(self._output(teacher.network, self.told, text_scale=scale, image_scale=image_scale, adapted=False))

    def untrained(self) -> Player:
        network = self.teacher_now().network  # with a gradient for the adapters of matching, which are on it
        return _player(self._output(network, self.told, adapted=False, caller=call_as_asked))

    def _output(
        self, network: nn.Module, told: Told, *, adapted: bool = True, caller: Any = call_without_gradient, **guided: Any
    ) -> Any:
        """`adapted`: With the adapters of the student's network. A teacher that is the same network has none."""
        call = caller(network)

        def plain(**inputs: Tensor) -> Tensor:
            with adapters_off(network):
                return call(**inputs)

        bare = not adapted and network is self.network
        return network_output(plain if bare else call, told, self.layout, self.dtype, **guided)


def _player(output: Any) -> Player:
    return Player(output, PROCESS, "velocity")
