"""The players of one batch of Open-Sora 1.x: its STDiT networks under text, reference frames and guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from torch import Tensor, nn

from opensora_perflow.hosts.v1.conditions import Condition
from opensora_perflow.hosts.v1.iddpm import guided_channels
from opensora_perflow.hosts.v1.keys import Keys
from opensora_perflow.hosts.v1.stdit import network_output
from opensora_perflow.method.ddpm import DDPM
from opensora_perflow.method.process import Process
from opensora_perflow.training.players import Player
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.teacher import Teacher


@dataclass(frozen=True)
class TrainingPlayers:
    """Student and teacher of one training batch.

    model, network: The student in the booster's wrapper, and bare.
    call: What is called where the student is trained: the model, or what watches its calls.
    teacher_now: Asked at every use, since a curriculum changes its teacher.
    student_condition, teacher_condition: What each network is told, made with its own null text.
    told: Guidance scales [B] that the student gets as an input (mode range).
    """

    recipe: Recipe
    keys: Keys
    process: Process
    prediction: str
    model: nn.Module
    network: nn.Module
    call: Callable[..., Tensor]
    teacher_now: Callable[[], Teacher]
    student_condition: Condition
    teacher_condition: Condition
    moving: Tensor | None = None
    told: Tensor | None = None

    @cached_property
    def student(self) -> Player:
        return self._player(self.call, self.network, self.student_condition, told=self.told)

    def sampled(self, window: int) -> Player:
        return self._sampled_with(self.keys.scale_in(window) if self._synced else 1.0)

    @cached_property
    def _synced(self) -> bool:
        # A network without a null text cannot be guided.
        return not self.recipe.guidance.folded and self.student_condition.null is not None

    @cached_property
    def _sampled_with(self) -> Callable[[float], Player]:
        """The player that is guided with a scale, made once."""
        flaw_fix = self.keys.use_flaw_fix and self._synced
        return cache(
            lambda scale: self._player(
                self.model,
                self.network,
                self.student_condition,
                text_scale=scale,
                image_scale=scale,
                flaw_fix=flaw_fix,
                told=self.told,
            )
        )

    def teacher(self, scale: float | Tensor) -> Player:
        guidance, teacher, told = self.recipe.guidance, self.teacher_now(), None
        image_scale = scale if guidance.image_scale is None else guidance.image_scale
        if teacher.is_student:  # its guidance is folded in
            told = scale if guidance.mode == "range" else None
            scale = image_scale = 1.0
        return self._player(
            teacher.network,
            teacher.network,
            self.teacher_condition,
            text_scale=scale,
            image_scale=image_scale,
            flaw_fix=self.keys.use_flaw_fix and guidance.folded and not teacher.is_student,
            told=told,
        )

    def untrained(self) -> Player:
        network = self.teacher_now().network
        return self._player(network, network, self.teacher_condition, told=self.told)

    def _player(self, call: Callable[..., Tensor], network: nn.Module, condition: Condition, **guidance: Any) -> Player:
        channels = guided_channels(self.keys.cfg_channel) if isinstance(self.process, DDPM) else None
        output = network_output(
            call,
            network,
            condition,
            frame_mask=self.moving,
            guided_channels=channels,
            **guidance,
        )
        return Player(output, self.process, self.prediction, self.moving)
