"""`training_losses` as the scripts of each tag call it, turned into a batch of the method, and its loss into their answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.v1.conditions import (
    Condition,
    Reference,
    draw_reference_drop,
    reference_frame_weights,
    training_condition,
    with_reference,
)
from opensora_perflow.hosts.v1.iddpm import VarianceMatch
from opensora_perflow.hosts.v1.keys import Keys
from opensora_perflow.hosts.v1.network import Interface, one_graph_a_step
from opensora_perflow.hosts.v1.players import TrainingPlayers
from opensora_perflow.hosts.v1.sampling import StepGuidance
from opensora_perflow.hosts.v1.stdit import idle_reference_embedders, separable, without_text_dropout
from opensora_perflow.hosts.wrappers import settle
from opensora_perflow.method.ddpm import DDPM
from opensora_perflow.method.draws import Drawn
from opensora_perflow.method.process import Process
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.objectives import mean_over_frames
from opensora_perflow.training.adapters import teacher_call
from opensora_perflow.training.blame import TEXT, TEXT_MASK
from opensora_perflow.training.players import Batch
from opensora_perflow.training.run import TrainingRun


@dataclass(frozen=True)
class TrainingCall:
    """The arguments of `PeRFlow.training_losses`, of whichever tag, in one form; the same in a sequence-parallel group.

    drawn_by_host: t is the draw of 1.0's and 1.1's train.py; else a given t is a question for the loss there.
    chains: Stored chain of each sample, [B], see stored.py; None: there are none.
    """

    model: nn.Module
    student: Interface
    x_start: Tensor
    model_args: Mapping[str, Any]
    t: Tensor | None
    drawn_by_host: bool
    noise: Tensor | None
    mask: Tensor | None
    weights: Tensor | None
    mask_index: Sequence[int] | None
    x_gt: Tensor | None
    noise_disable_threshold: float | None
    text_uncond_prob: float | None
    x_noisy_ref: Tensor | None
    chains: Tensor | None = None

    @property
    def references(self) -> bool:
        """Are there reference frames?"""
        return self.mask_index is not None and len(self.mask_index) > 0

    @property
    def frame_weights(self) -> Tensor | None:
        return None if self.mask is None else self.mask.float()


@dataclass(frozen=True)
class HostLosses:
    """What the host's networks add to the method's loss."""

    call: TrainingCall
    variance: VarianceMatch | None
    frame_weights: Tensor | None

    def added_to(self, loss: Tensor) -> Tensor:
        """The losses [B] that the script gets."""
        error = None if self.variance is None else self.variance.take_error()
        if error is not None:
            loss = loss + mean_over_frames(error, self.frame_weights)
        mask_index = self.call.mask_index
        if mask_index is not None and len(mask_index) == 0 and torch.is_grad_enabled():
            settle(self.call.model)
            loss = loss + idle_reference_embedders(self.call.student.network)
        return loss


@dataclass(frozen=True)
class Translation:
    """From a call to a batch, for a scheduler's settings and its run.

    negative: What `negative_text.read_negative` gave, or None.
    """

    run: TrainingRun
    keys: Keys
    process: Process
    prediction: str
    negative: Mapping[str, Tensor] | None

    def draw(self, call: TrainingCall, windows: WarpedWindows, generator: torch.Generator) -> Drawn:
        """Windows by a drawn or given timestep per sample; one that is asked for is the only time that is trained."""
        given = None if call.t is None else self.process.from_timestep(call.t)
        discrete = self.keys.use_discrete_timesteps
        drawn = self.run.draw(
            windows,
            generator,
            grids=self._grids(),
            # 1.0 and 1.1 checkpoint gradients re-entrantly, which ZeRO's hooks bear for one evaluation a step.
            single=discrete or (call.drawn_by_host and self.run.recipe.draws.per_solve is None),
            num_levels=self.process.num_timesteps if discrete and given is None else None,
            given=given,
            given_only=given is not None and not call.drawn_by_host,
        )
        if call.weights is None:
            return drawn
        index = self.process.to_timestep(drawn.times).long().clamp(max=len(call.weights) - 1)
        return replace(drawn, weights=drawn.weights * call.weights.to(drawn.weights.device)[index])

    def batch(self, call: TrainingCall, windows: WarpedWindows, generator: torch.Generator) -> tuple[Batch, HostLosses]:
        """The batch of a call; the order of draws is windows, noise, text dropout, reference dropout, scale."""
        run, guidance = self.run, self.run.recipe.guidance
        drawn = self.draw(call, windows, generator)
        data = self._data(call, drawn)
        noise = call.noise if call.chains is None else torch.zeros_like(data)  # a store gives it where a window starts there
        noise = torch.randn(data.shape, device=data.device, generator=generator) if noise is None else noise.float()
        student, teacher, frame_weights = self._conditions(call, generator)
        scale = guidance.draw_scale(drawn.window_idx, generator)
        if call.chains is not None and guidance.mode == "range":
            scale = run.store.scales(call.chains).to(data.device)
        guided = self._guided(drawn, student, data.shape[2])
        network, model = call.student.network, without_text_dropout(call.model, call.student)
        trained = one_graph_a_step(model, network) if call.drawn_by_host else model
        keeps_variance = isinstance(self.process, DDPM) and self.prediction != "velocity" and self.keys.learn_sigma
        variance = VarianceMatch(trained, teacher_call(run.teacher.network, network)) if keeps_variance else None
        players = TrainingPlayers(
            run,
            self.keys,
            self.process,
            self.prediction,
            network,
            variance or trained,
            model,
            windows,
            student,
            teacher,
            guided,
            separable(student, len(data)),
            moving=call.mask,
            told=scale if guidance.mode == "range" else None,
            route=drawn.route if run.recipe.draws.two_time else None,
        )
        told = partial(self._told, student, teacher)
        batch = Batch(data, noise, windows, drawn, players, scale, frame_weights, call.chains, told)
        return batch, HostLosses(call, variance, frame_weights)

    def _guided(self, drawn: Drawn, student: Condition, num_frames: int) -> list[dict[str, Any]]:
        """How the sampler that takes one step a window guides in each, on each sample's own route."""
        guidance, count = self.run.recipe.guidance, len(drawn.route) - 1
        if guidance.folded or student.null is None:  # a network without a null text cannot be guided
            return [{}] * count
        num_steps = (drawn.route > 0).sum(dim=0)
        steps = StepGuidance.of(guidance, self.keys, num_frames, self.keys.scales(None, count), num_steps=num_steps)
        return list(map(steps.at, range(count)))

    def _told(self, student: Condition, teacher: Condition) -> dict[str, Any]:
        """What the networks are told besides state and time, by name in words, in the order in which it is suspected."""
        told: dict[str, Any] = {
            "the network's null text": student.null,
            TEXT: student.text,
            TEXT_MASK: student.text_mask,
        }
        told |= {f"{name!r} of the batch": value for name, value in student.extras.items()}
        if student.reference is not None:
            told["the latents of reference frames"] = student.reference.latents
        if self.negative is not None:
            told["the embedding of guidance.negative"] = teacher.null
        if not self.run.recipe.guidance.folded:
            told["cfg_scale, the guidance scale"] = float(sum(self.keys.scales(None, self.run.windows.num_windows)))
        if self.run.recipe.guidance.image_scale is not None:
            told["guidance.image_scale"] = float(self.run.recipe.guidance.image_scale)
        return {name: value for name, value in told.items() if value is not None}

    def _grids(self) -> list[TimeWindows]:
        """The uniform grids that the student is trained for as well."""
        whole, count = self.keys.use_discrete_timesteps, self.process.num_timesteps
        grids = map(TimeWindows.uniform, self.run.recipe.draws.grids)
        return [windows.rounded(count) if whole else windows for windows in grids]

    def _data(self, call: TrainingCall, drawn: Drawn) -> Tensor:
        data = call.x_start.detach().float()
        if call.noise_disable_threshold is None or call.x_gt is None:
            return data
        clean = drawn.t_start * self.process.num_timesteps > call.noise_disable_threshold
        return torch.where(clean.to(data.device)[:, None, None, None, None], call.x_gt.detach().float(), data)

    def _conditions(self, call: TrainingCall, generator: torch.Generator) -> tuple[Condition, Condition, Tensor | None]:
        """What student and teacher are told, after the same dropout for both; and the loss weights of the frames."""
        folded = self.run.recipe.guidance.folded
        references, frame_weights = call.references, call.frame_weights
        drop = None if folded else self._text_drop(call, generator)
        student_condition = training_condition(call.student, call.model_args, drop)
        teacher_condition = training_condition(Interface.of(self.run.teacher.network), call.model_args, drop, self.negative)
        if not references:
            return student_condition, teacher_condition, frame_weights
        reference = Reference.of(call.x_start if call.x_noisy_ref is None else call.x_noisy_ref, call.mask_index)
        dropped = draw_reference_drop(None if folded else self.keys.drop_condition, generator)
        conditions = (with_reference(c, reference, dropped) for c in (student_condition, teacher_condition))
        return *conditions, reference_frame_weights(reference, self.keys.x_cond_weight)

    @staticmethod
    def _text_drop(call: TrainingCall, generator: torch.Generator) -> Tensor | None:
        asked, student = call.text_uncond_prob, call.student
        probability = student.text_dropout if asked is None or not student.network.training else asked
        if probability <= 0:
            return None
        return torch.rand(len(call.x_start), device=call.x_start.device, generator=generator) < probability
