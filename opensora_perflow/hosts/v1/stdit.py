"""Open-Sora's networks (STDiT, STDiT2, STDiT3, and what shares their call) as fields of state and time.

One evaluation of the network may carry several branches of guidance: the batch is repeated, branch after branch, because the
network tiles the text mask that way (v1.2.0 opensora/models/stdit/stdit3.py:344). What v1.2 and v1.3 take differently is told
from the signature of forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora_perflow.conventions import expand_like, host_to_velocity, interpolate, to_timestep
from opensora_perflow.hosts.v1.network import accepted_arguments, declares, null_text, weights_dtype, without_text_dropout
from opensora_perflow.hosts.v1.scale_input import told_scale
from opensora_perflow.method.guidance import classifier_free, rescale_to_cond, text_and_image
from opensora_perflow.method.solvers import Velocity

# Arguments of a network call that this module sets itself, wherever the host put them.
_OWN_ARGUMENTS = ("y", "mask", "x_mask", "cond", "cond_mask", "mask_index", "y_null", "text_uncond_prob")


class Branch(NamedTuple):
    """Which of the conditions one branch of guidance sees."""

    text: bool
    reference: bool


FULL, NO_TEXT, NOTHING = Branch(True, True), Branch(False, True), Branch(False, False)


@dataclass(frozen=True)
class Reference:
    """Reference frames of v1.3's image and video conditioning, one set of frame indices for the whole batch."""

    frames: tuple[int, ...]
    latents: Tensor
    """[B, C, T, H, W], zero outside the reference frames."""

    @classmethod
    def of(cls, latents: Tensor, frames: Sequence[int]) -> Reference:
        """Keep the frames `frames` of `latents` [B, C, T, H, W].

        Raises:
            ValueError: a frame index outside 0..T-1.
        """
        num_frames = latents.shape[2]
        if any(not 0 <= frame < num_frames for frame in frames):
            raise ValueError(f"mask_index must hold latent frame indices in 0..{num_frames - 1}, got {list(frames)}")
        reference = cls(tuple(frames), latents)
        return replace(reference, latents=latents * reference.mask)

    @property
    def mask(self) -> Tensor:
        """1 on the reference frames, 0 elsewhere; shaped like the latents."""
        mask = torch.zeros_like(self.latents)
        mask[:, :, list(self.frames)] = 1.0
        return mask


@dataclass(frozen=True)
class Condition:
    """What a network is told besides state and time, for a batch of B samples."""

    text: Tensor
    """[B, 1, L, D]; with skip_y_embedder whatever the host packed."""
    text_mask: Tensor | None
    """[B, L], 1 where there is a token."""
    null: Tensor | None
    """Text of the unguided branch, like `text`: the null embedding, or negative prompts. Truncated by the prompt's own mask
    unless `null_mask` is given, as the host does it."""
    null_mask: Tensor | None = None
    strict_null: Tensor | None = None
    """The null embedding even where `null` holds negative prompts: what v1.3 shows the reference frames."""
    reference: Reference | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    """fps, height, width, num_frames, ar and whatever else the host sends along, [B] each; never tiled (the network does)."""


def training_condition(
    network: nn.Module,
    model_args: Mapping[str, Any],
    drop: Tensor | None = None,
    negative: Mapping[str, Tensor] | None = None,
) -> Condition:
    """The condition that the host's training script describes, with dropped prompts replaced by this network's null text.

    Args:
        network: The unwrapped network that will see it; its own null embedding is used.
        model_args: The host's dict: y, mask, sizes. Left as it is.
        drop: bool [B], True where the prompt is dropped; None drops nothing.
        negative: y [1, L, D] and mask [1, L] of a negative prompt, which guidance then leads away from in place of the null
            text; see hosts/v1/negative_text.py.

    Raises:
        ValueError: no text in model_args, prompts are to be dropped and the network has no null text, or a negative prompt of
            other sizes than the prompts.
    """
    if "y" not in model_args:
        raise ValueError(f"model_args needs the text embeddings 'y', got the keys {sorted(model_args)}")
    text = model_args["y"]
    null = null_text(network, text)
    if drop is not None and bool(drop.any()):
        if null is None:
            raise ValueError("prompts cannot be dropped: the network has no null text; use the model's class_dropout_prob=0")
        text = torch.where(drop.to(text.device)[:, None, None, None], null, text)
    condition = Condition(text, model_args.get("mask"), null, strict_null=null, extras=_extras(network, model_args))
    return condition if negative is None else with_negative(condition, negative)


def encode_text(text_encoder: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """y [B, 1, L, D], mask [B, L] and whatever else the host's text encoder makes of prompts."""
    tokenize = getattr(text_encoder, "tokenize_fn", None)  # v1.3 tokenizes in the dataset's workers, 1.2 inside encode
    return dict(text_encoder.encode(**tokenize(list(prompts))) if tokenize else text_encoder.encode(list(prompts)))


def sampling_condition(
    network: nn.Module,
    text_encoder: Any,
    prompts: Sequence[str],
    *,
    negative_prompts: Sequence[str] | None,
    additional_args: Mapping[str, Any],
    reference: Reference | None,
    needs_null: bool,
) -> Condition:
    """Encode prompts as the host's sampler does; `needs_null` is False where no branch is unguided."""
    encoded = encode_text(text_encoder, prompts)
    null = null_mask = strict_null = None
    if needs_null or reference is not None:
        null = strict_null = text_encoder.null(len(prompts)).to(encoded["y"].device)
    if negative_prompts is not None and needs_null:
        negative = encode_text(text_encoder, negative_prompts)
        null, null_mask = negative["y"], negative.get("mask")
    extras = {**{key: value for key, value in encoded.items() if key not in ("y", "mask")}, **additional_args}
    return Condition(encoded["y"], encoded.get("mask"), null, null_mask, strict_null, reference, _extras(network, extras))


def draw_reference_drop(drop_condition: Mapping[str, float] | None, generator: torch.Generator) -> tuple[bool, bool]:
    """v1.3's dropout of image and video conditioning, one draw for the batch: (drop the text?, drop the reference?).

    `cond` drops the text, `text` the reference, `null` both, `keep` neither (the names and their weights are upstream's, v1.3
    opensora/schedulers/rf/rectified_flow.py:74). None keeps everything, without a draw.
    """
    if not drop_condition:
        return False, False
    weights = torch.tensor(list(drop_condition.values()), dtype=torch.float64, device=generator.device)
    drawn = list(drop_condition)[int(torch.multinomial(weights, 1, generator=generator))]
    return drawn in ("null", "cond"), drawn in ("null", "text")


def with_reference(condition: Condition, reference: Reference, drop: tuple[bool, bool]) -> Condition:
    """The condition with reference frames, after the dropout of `draw_reference_drop`. Dropped frames keep their mask."""
    drop_text, drop_reference = drop
    if condition.null is None:
        raise ValueError("reference frames need the network's null text (y_embedder.y_embedding), and there is none")
    if drop_reference:
        reference = replace(reference, latents=torch.zeros_like(reference.latents))
    return replace(condition, reference=reference, text=condition.null if drop_text else condition.text)


def with_negative(condition: Condition, negative: Mapping[str, Tensor]) -> Condition:
    """The condition with one negative prompt, y [1, L, D] and mask [1, L], in place of the null text of every sample."""
    y, text = negative["y"], condition.text
    if text.dim() != 4 or y.shape[1:] != text.shape[2:]:
        raise ValueError(
            f"the negative prompt's y is {list(y.shape)}, which does not go with text embeddings {list(text.shape)}; make it "
            "with the config of this training, whose text encoder and model_max_length it needs (skip_y_embedder takes none)"
        )
    null_mask = negative["mask"].to(text.device).expand(len(text), -1)
    return replace(condition, null=y.to(text.device, text.dtype).expand_as(text), null_mask=null_mask)


def put_back_reference(
    x: Tensor, t: Tensor, reference: Reference, add_noise: Callable[[Tensor, Tensor, Tensor], Tensor] = interpolate
) -> Tensor:
    """The state with its reference frames replaced by the reference noised to time t (upstream's use_sdedit)."""
    noised = add_noise(reference.latents, torch.randn_like(reference.latents), t)
    return torch.where(reference.mask == 1, noised, x)


def prediction_field(
    call: Callable[..., Tensor],
    network: nn.Module,
    condition: Condition,
    *,
    to_timestep: Callable[[Tensor], Tensor],
    frame_mask: Tensor | None = None,
    text_scale: float | Tensor = 1.0,
    image_scale: float | Tensor = 1.0,
    guided_channels: int | None = None,
    flaw_fix: bool = False,
    told: Tensor | None = None,
) -> Velocity:
    """The network under a condition, guided, as a field prediction(x, t): what it outputs, without its variance half.

    Args:
        call: What to call: the network, or the booster's wrapper around it (gradients and gathered weights need that one).
        network: The network itself, to read its signature and its text dropout.
        condition: Text, reference frames and sizes for B samples.
        to_timestep: Flow time -> what the network is told.
        frame_mask: bool [B, T]; False marks frames that stand still at t = 0.
        text_scale: Classifier-free guidance by text, a number or one a sample [B]; 1 = none, one evaluation of B samples
            instead of two (a tensor always takes two).
        image_scale: Guidance by reference frames (a third branch), likewise, or anything that multiplies [B, C, T, H, W]; only
            with a reference.
        guided_channels: Text guidance acts on the first so many channels; the others are the conditional prediction's, as in
            upstream's iddpm (v1.1.0 opensora/schedulers/iddpm/__init__.py, forward_with_cfg). None: all.
        flaw_fix: Rescale the guided prediction (text guidance alone, as upstream).
        told: Guidance scales [B] that the network is told as an input, see hosts/v1/scale_input.py; None: it takes none.

    Returns:
        prediction(x, t): x [B, C, T, H, W], t [B] in [0, 1] -> [B, C, T, H, W], float32.

    Raises:
        ValueError: guidance without null text, an argument that this network's forward does not take, or a network that cannot
            be told a scale.
    """
    guided, guided_by_image = (isinstance(scale, Tensor) or scale != 1.0 for scale in (text_scale, image_scale))
    if condition.reference is not None and (guided or guided_by_image):
        branches = (FULL, NO_TEXT, NOTHING)
    elif condition.reference is None and guided:
        branches = (FULL, NO_TEXT)
    else:
        branches = (FULL,)
    inputs = _network_inputs(network, condition, branches, frame_mask)
    told = None if told is None else told.repeat(len(branches))

    def prediction(x: Tensor, t: Tensor) -> Tensor:
        timestep = to_timestep(t.to(x.device))
        with without_text_dropout(network) as quiet, told_scale(network, told):
            output = call(x.repeat(len(branches), *[1] * (x.dim() - 1)), timestep.repeat(len(branches)), **inputs, **quiet)
        parts = halves(output, x.shape[1])[0].chunk(len(branches))
        if len(parts) == 3:
            return text_and_image(*parts, _factor(text_scale, x), _factor(image_scale, x))
        if len(parts) == 2:
            guided = classifier_free(*parts, _factor(text_scale, x))
            if guided_channels is not None:
                guided = torch.cat([guided[:, :guided_channels], parts[0][:, guided_channels:]], dim=1)
            return rescale_to_cond(guided, parts[0]) if flaw_fix else guided
        return parts[0]

    return prediction


def velocity_field(
    call: Callable[..., Tensor], network: nn.Module, condition: Condition, *, num_timesteps: int, **settings: Any
) -> Velocity:
    """A rectified-flow network as the field dx/dt = velocity(x, t); its timesteps are t num_timesteps.

    Arguments, errors and `settings` as `prediction_field`.
    """
    prediction = prediction_field(
        call, network, condition, to_timestep=partial(to_timestep, num_timesteps=num_timesteps), **settings
    )
    return lambda x, t: host_to_velocity(prediction(x, t))


def halves(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """A network's output [B, C or 2 C, ...] as (prediction, variance half or None), float32.

    The second half is iddpm's learned variance; rectified flow never uses it (pred_sigma).
    """
    # colossalai's tensor subclass does not update in place, and it spreads through every result.
    output = output.as_subclass(Tensor).float()
    if output.shape[1] != 2 * channels:
        return output, None
    prediction, variance = output.chunk(2, dim=1)
    return prediction, variance


def reference_frame_weights(reference: Reference, weight: float) -> Tensor:
    """Loss weights [B, T] that give each reference frame `weight` and keep the total at T."""
    batch_size, _, num_frames = reference.latents.shape[:3]
    count = len(reference.frames)
    other = (num_frames - count * weight) / (num_frames - count) if count < num_frames else 1.0
    weights = torch.full((batch_size, num_frames), other, device=reference.latents.device)
    weights[:, list(reference.frames)] = weight
    return weights


def idle_reference_embedders(network: nn.Module) -> Tensor | float:
    """0, with a gradient of 0 for the weights that embed reference frames (v1.3).

    A step without such frames leaves them out, as it is sampled; upstream adds what they make of zeros. But ZeRO reduces the
    gradients that there are, and whether a batch has reference frames is each rank's own draw (v1.3 scripts/train.py,
    mask_randgen): added to the loss, this has all ranks reduce the same.
    """
    embedders = (getattr(network, name, None) for name in ("x_embedder_cond", "x_embedder_cond_mask"))
    weights = [p for embedder in embedders if embedder is not None for p in embedder.parameters() if p.requires_grad]
    return sum(0.0 * weight.as_subclass(Tensor).flatten()[0].float() for weight in weights)


def _factor(scale: float | Tensor, x: Tensor) -> float | Tensor:
    """A scale as something to multiply predictions for x with: [B] -> [B, 1, ..., 1]."""
    if not isinstance(scale, Tensor):
        return scale
    return expand_like(scale, x.float()) if scale.dim() == 1 else scale.to(x.device)


def _network_inputs(
    network: nn.Module, condition: Condition, branches: Sequence[Branch], frame_mask: Tensor | None
) -> dict[str, Any]:
    accepts = accepted_arguments(network)
    inputs = dict(condition.extras)
    if any(not branch.text for branch in branches) and condition.null is None:
        raise ValueError(
            "guidance needs the network's null text (y_embedder.y_embedding), and this network has none for the text it is "
            'given (skip_y_embedder or pre-computed text features); use guidance=dict(mode="sync") with cfg_scale=1 or a '
            'teacher that needs no guidance: guidance=dict(mode="fixed", scale=1.0)'
        )
    if len(branches) == 1:
        inputs["y"] = condition.text
    else:  # negative prompts and null text are float32 from the encoder, the text may be half precision: cat promotes
        inputs["y"] = torch.cat([condition.text if branch.text else condition.null for branch in branches])
    if condition.text_mask is not None:
        inputs["mask"] = condition.text_mask
        if len(branches) > 1 and condition.null_mask is not None:
            inputs["mask"] = torch.cat([condition.text_mask if b.text else condition.null_mask for b in branches])
    if frame_mask is not None:
        if not accepts("x_mask"):
            raise ValueError(f"{type(network).__name__} takes no frame mask (x_mask); leave out mask_ratios and references")
        inputs["x_mask"] = frame_mask.repeat(len(branches), 1)
    if condition.reference is not None:
        if not declares(network, "mask_index"):
            raise ValueError(
                f"{type(network).__name__} takes no reference frames (mask_index); image and video conditioning needs the "
                "STDiT3 of Open-Sora 1.3"
            )
        latents, mask = condition.reference.latents, condition.reference.mask
        nothing = torch.zeros_like(latents)
        # The network casts x and y to its own precision, but not these (v1.3 opensora/models/stdit/stdit3.py:442 and 500).
        dtype = weights_dtype(network)
        inputs["cond"] = torch.cat([latents if branch.reference else nothing for branch in branches]).to(dtype)
        inputs["cond_mask"] = mask.repeat(len(branches), 1, 1, 1, 1).to(dtype)
        inputs["mask_index"] = list(condition.reference.frames)
        inputs["y_null"] = condition.strict_null.repeat(len(branches), 1, 1, 1).to(dtype)
    return inputs


def _extras(network: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    accepts = accepted_arguments(network)
    return {key: value for key, value in arguments.items() if key not in _OWN_ARGUMENTS and accepts(key)}
