"""The players of one batch of Open-Sora 1.x: its STDiT networks under text, reference frames and guidance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from opensora_perflow.hosts.v1.conditions import Condition
from opensora_perflow.hosts.v1.iddpm import guided_channels
from opensora_perflow.hosts.v1.keys import Keys
from opensora_perflow.hosts.v1.stdit import network_output
from opensora_perflow.method.ddpm import DDPM
from opensora_perflow.method.process import Process
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.training.adapters import teacher_call
from opensora_perflow.training.players import Player
from opensora_perflow.training.run import TrainingRun


@dataclass(frozen=True)
class TrainingPlayers:
    """Student and teacher of one training batch.

    run: Whose recipe counts, and whose teacher, which a curriculum changes.
    network: The student, bare.
    trained, sampled_by: What is called where the student is trained, and where it is sampled.
    windows: The student's.
    student_condition, teacher_condition: What each network is told, made with its own null text.
    guided: How the sampler that takes one step a window guides the student in each, as `network_output` takes it.
    told: Guidance scales [B] that the student gets as an input (mode range).
    route: The steps by which the student comes to each window, [R + 1, B], where it is told their length; None: it is not.
    """

    run: TrainingRun
    keys: Keys
    process: Process
    prediction: str
    network: nn.Module
    trained: Callable[..., Tensor]
    sampled_by: Callable[..., Tensor]
    windows: WarpedWindows
    student_condition: Condition
    teacher_condition: Condition
    guided: Sequence[Mapping[str, Any]]
    separable: bool
    moving: Tensor | None = None
    told: Tensor | None = None
    route: Tensor | None = None

    @cached_property
    def student(self) -> Player:
        player = self._player(self.network, self.student_condition, self.trained, told=self.told)
        return replace(player, two_time=self.route is not None)

    def sampled(self, window: int, rows: Tensor | None = None) -> Velocity:
        # Windows are cut to the rows when asked, which only epsilon networks are.
        bounds = self.windows.bounds if rows is None else lambda t: self.windows.take(rows).bounds(t)
        how = {"told": self.told, **self.guided[window]}
        player = self._player(self.network, self.student_condition, self.sampled_by, rows, **how)
        if self.route is None:
            return player.velocity(bounds)
        step = self.route[window : window + 2] if rows is None else self.route[window : window + 2, rows]
        return replace(player, two_time=True).velocity(lambda t: (step[0], step[1]))

    def teacher(self, scale: float | Tensor) -> Player:
        guidance, teacher, told = self.run.recipe.guidance, self.run.teacher, None
        image_scale = scale if guidance.image_scale is None else guidance.image_scale
        if teacher.is_student:  # its guidance is folded in
            told = scale if guidance.mode == "range" else None
            scale = image_scale = 1.0
        return self._player(
            teacher.network,
            self.teacher_condition,
            text_scale=scale,
            image_scale=image_scale,
            flaw_fix=self.keys.use_flaw_fix and guidance.folded and not teacher.is_student,
            told=told,
        )

    def untrained(self) -> Player:
        return self._player(self.run.teacher.network, self.teacher_condition, told=self.told)

    def _player(
        self,
        network: nn.Module,
        condition: Condition,
        call: Callable[..., Tensor] | None = None,
        rows: Tensor | None = None,
        **guidance: Any,
    ) -> Player:
        """A network under a condition, of some rows; `call` None: it answers as the teacher."""
        call = teacher_call(network, self.network) if call is None else call
        told = {"frame_mask": self.moving, **guidance}
        if isinstance(self.process, DDPM):
            told["guided_channels"] = guided_channels(self.keys.cfg_channel)
        if rows is not None:
            of_samples = {name: value for name, value in told.items() if isinstance(value, Tensor) and len(value) > 1}
            told |= {name: value[rows.to(value.device)] for name, value in of_samples.items()}
        output = network_output(call, network, condition, rows=rows, **told)
        return Player(output, self.process, self.prediction, told["frame_mask"])
