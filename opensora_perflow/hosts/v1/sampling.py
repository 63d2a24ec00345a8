"""`sample` as the scripts of each tag call it: conditions and guidance of every step, around the method's sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.v1.conditions import Condition, Reference, put_back_reference, sampling_condition
from opensora_perflow.hosts.v1.iddpm import guided_channels
from opensora_perflow.hosts.v1.keys import Keys
from opensora_perflow.hosts.v1.network import Interface
from opensora_perflow.hosts.v1.stdit import network_output, without_text_dropout
from opensora_perflow.method.ddpm import DDPM
from opensora_perflow.method.guidance import image_scale_ramp, oscillating_scale
from opensora_perflow.method.long_video import fade_change
from opensora_perflow.method.process import Process
from opensora_perflow.method.sampler import FrameEdit, sample
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.training.players import Player
from opensora_perflow.training.recipe import Guidance


@dataclass(frozen=True)
class StepGuidance:
    """How much guidance each step has, and of which kind: of the sampler, and of the roll-out that student starts come from.

    text, image: One scale a step. oscillate: Whether (text, image) oscillate.
    num_steps: Steps that each sample takes in all [B], where they differ; None: as many as there are scales.
    """

    guidance: Guidance
    keys: Keys
    num_frames: int
    text: Sequence[float]
    image: Sequence[float]
    oscillate: tuple[bool, bool]
    num_steps: Tensor | None = None

    @classmethod
    def of(
        cls,
        guidance: Guidance,
        keys: Keys,
        num_frames: int,
        text: Sequence[float],
        image_scale: float | None = None,
        oscillate: tuple[bool | None, bool | None] = (None, None),
        num_steps: Tensor | None = None,
    ) -> StepGuidance:
        """`image_scale` of all steps, None as by text; `oscillate` None: as the keys say."""
        image = text if image_scale is None or guidance.folded else [image_scale] * len(text)
        chosen = tuple(keys.use_oscillation_guidance if asked is None else asked for asked in oscillate)
        return cls(guidance, keys, num_frames, text, image, chosen, num_steps)

    def at(self, step: int) -> dict[str, Any]:
        """Guidance of one step, as `stdit.network_output` takes it; empty where it is in the weights."""
        keys = self.keys
        if self.guidance.folded:
            return {}
        text, image = (
            oscillating_scale(scales[step], step, keys.force_num) if on else scales[step]
            for scales, on in zip((self.text, self.image), self.oscillate)
        )
        if keys.scale_image_weight and image > keys.initial_image_scale:
            image = self._ramp(image, step)
        return {"text_scale": text, "image_scale": image, "flaw_fix": keys.use_flaw_fix}

    def told(self, step: int, batch_size: int) -> Tensor | None:
        """The scales [B] that the network gets as an input in one step; None where it takes none."""
        if self.guidance.mode != "range":
            return None
        return torch.full((batch_size,), self.text[step], dtype=torch.float64)

    def _ramp(self, image: float, step: int) -> Tensor:
        """[1, 1, T, 1, 1], or [B, 1, T, 1, 1] where samples differ in their number of steps."""
        counts = [len(self.text)] if self.num_steps is None else self.num_steps.tolist()
        counts = counts[:1] if len(set(counts)) == 1 else counts
        initial = self.keys.initial_image_scale
        # A sample that has arrived may be carried along, past its last step.
        return torch.cat([image_scale_ramp(image, initial, min(step, n - 1), n, self.num_frames) for n in counts])


@dataclass(frozen=True)
class SamplingCall:
    """The arguments of `PeRFlow.sample`, of whichever tag, in one form; tensors on the device where it samples."""

    model: nn.Module
    network: nn.Module
    text_encoder: Any
    x: Tensor
    prompts: Sequence[str]
    additional_args: Mapping[str, Any]
    mask: Tensor | None
    neg_prompts: Sequence[str] | None
    reference: Reference | None
    use_sdedit: bool
    progress: bool

    @property
    def complete(self) -> list[str]:
        """A warning where a clip consists of reference frames alone."""
        num_frames, reference = self.x.shape[2], self.reference
        given = self.mask is not None and bool((self.mask == 0).all(dim=1).any())
        if not given and (reference is None or len(set(reference.frames)) < num_frames):
            return []
        return [
            f"all {num_frames} latent frames of a clip are reference frames, so that the clip adds nothing (to a --loop, for "
            "example): give it more frames (num_frames), or fewer reference frames (condition_frame_length)"
        ]

    def condition(self, needs_null: bool) -> Condition:
        return sampling_condition(
            self.network,
            self.text_encoder,
            self.prompts,
            negative_prompts=self.neg_prompts,
            additional_args=self.additional_args,
            reference=self.reference,
            needs_null=needs_null,
        )


def reference_of(z_cond: Tensor | None, mask_index: Sequence[int] | None, device: torch.device | str) -> Reference | None:
    """v1.3's reference frames; None where there are none.

    Raises:
        ValueError: frames are named and there are no latents of them.
    """
    if mask_index is None or len(mask_index) == 0:
        return None
    if z_cond is None:
        raise ValueError(f"mask_index {list(mask_index)} names reference frames, but z_cond is None; pass both")
    return Reference.of(z_cond.to(device).float(), mask_index)


def without_effect(guidance: Guidance, scale: Any, negative: Any, image_scale: float | None) -> list[str]:
    """Warnings of what was asked of the sampler and is in the weights instead."""
    said: list[str] = []
    if guidance.folded and ((scale is not None and guidance.mode == "fixed") or negative is not None):
        said.append("guidance is folded into the weights: guidance_scale and negative prompts have no effect")
    if guidance.folded and image_scale is not None and image_scale != guidance.image_scale:
        folded = "the scale of the text" if guidance.image_scale is None else f"scale {guidance.image_scale:g}"
        said.append(
            f"guidance by reference frames is folded into the weights, with {folded}: image_cfg_scale={image_scale:g} has no "
            "effect"
        )
    return said


def sample_latents(
    call: SamplingCall,
    grid: Sequence[float],
    windows: WarpedWindows,
    guidance: StepGuidance,
    process: Process,
    prediction: str,
    two_time: bool = False,
) -> Tensor:
    """Latents [B, C, T, H, W], float32, for a call.

    Args:
        call: See there.
        grid: Times of the steps, untransformed, from 1 to 0.
        windows: The student's.
        guidance: Of each step.
        process, prediction: What the network was trained on, and what its output stands for.
        two_time: See Player.
    """
    condition = call.condition(needs_null=not guidance.guidance.folded)
    channels = guided_channels(guidance.keys.cfg_channel) if isinstance(process, DDPM) else None
    model, times = without_text_dropout(call.model, Interface.of(call.network)), windows.times(grid)

    def field_at(step: int, frame_mask: Tensor | None) -> Velocity:
        output = network_output(
            model,
            call.network,
            condition,
            frame_mask=frame_mask,
            guided_channels=channels,
            told=guidance.told(step, len(call.x)),
            **guidance.at(step),
        )
        bounds = (lambda t: (times[step], times[step + 1])) if two_time else windows.bounds
        return Player(output, process, prediction, two_time=two_time).velocity(bounds)

    before_step = None
    if call.use_sdedit and call.reference is not None:
        before_step = partial(put_back_reference, reference=call.reference, add_noise=process.add_noise)
    joint, mask, kept, given = guidance.keys.long_video, call.mask, None, call.x
    if joint is not None and call.reference is not None:
        kept, given = call.reference.mask[:, 0, :, 0, 0] == 1, call.reference.latents
    elif joint is not None and mask is not None:
        kept = mask == 0
        mask = mask.masked_fill(kept, joint.edit)
    edit = None if mask is None else FrameEdit(mask, add_noise=process.add_noise)
    clip = sample(field_at, call.x, times, edit=edit, before_step=before_step, progress=call.progress)
    return clip if kept is None else fade_change(clip, given, kept, joint.frames)
