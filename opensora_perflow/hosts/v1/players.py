"""The players of one batch of Open-Sora 1.x: its STDiT networks under text, reference frames and guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.v1.conditions import Condition
from opensora_perflow.hosts.v1.iddpm import guided_channels
from opensora_perflow.hosts.v1.keys import Keys
from opensora_perflow.hosts.v1.sampling import StepGuidance
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
    sampler: How the sampler that takes one step a window guides the student.
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
    batch_size: int
    student_condition: Condition
    teacher_condition: Condition
    sampler: StepGuidance
    moving: Tensor | None = None
    told: Tensor | None = None

    @cached_property
    def student(self) -> Player:
        return self._player(self.call, self.network, self.student_condition, self.moving, told=self.told)

    @property
    def separable(self) -> bool:
        return self.student_condition.take(torch.arange(self.batch_size), self.batch_size) is not None

    def sampled(self, window: int, rows: Tensor | None = None) -> Player:
        condition, moving, told, steps = self.student_condition, self.moving, self.told, self.sampler
        if rows is not None:
            condition, steps = condition.take(rows, self.batch_size), steps.take(rows)
            moving, told = (None if value is None else value[rows.to(value.device)] for value in (moving, told))
        # A network without a null text cannot be guided.
        guided = {} if condition.null is None else steps.at(window)
        return self._player(self.model, self.network, condition, moving, told=told, **guided)

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
            self.moving,
            text_scale=scale,
            image_scale=image_scale,
            flaw_fix=self.keys.use_flaw_fix and guidance.folded and not teacher.is_student,
            told=told,
        )

    def untrained(self) -> Player:
        network = self.teacher_now().network
        return self._player(network, network, self.teacher_condition, self.moving, told=self.told)

    def _player(
        self, call: Callable[..., Tensor], network: nn.Module, condition: Condition, moving: Tensor | None, **guidance: Any
    ) -> Player:
        channels = guided_channels(self.keys.cfg_channel) if isinstance(self.process, DDPM) else None
        output = network_output(
            call,
            network,
            condition,
            frame_mask=moving,
            guided_channels=channels,
            **guidance,
        )
        return Player(output, self.process, self.prediction, moving)
