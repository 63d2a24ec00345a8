"""What Open-Sora's networks are told besides state and time: text, reference frames, sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.conventions import interpolate
from opensora_perflow.hosts.v1.network import Interface

# Arguments of a network call that stdit.py sets itself, wherever the host put them.
_OWN_ARGUMENTS = ("y", "mask", "x_mask", "cond", "cond_mask", "mask_index", "y_null", "text_uncond_prob")


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
    made: dict[Any, dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What stdit.py has made of it for a network and branches: the same at every step."""


def training_condition(
    network: Interface,
    model_args: Mapping[str, Any],
    drop: Tensor | None = None,
    negative: Mapping[str, Tensor] | None = None,
) -> Condition:
    """The condition that the host's training script describes, with dropped prompts replaced by this network's null text.

    Args:
        network: That will see it; its own null embedding is used.
        model_args: The host's dict: y, mask, sizes. Left as it is.
        drop: bool [B], True where the prompt is dropped; None drops nothing.
        negative: y [1, L, D] and mask [1, L] of a negative prompt, which takes the place of the null text in guidance; see
            hosts/v1/negative_text.py.

    Raises:
        ValueError: no text in model_args; prompts to be dropped and no null text; or a negative prompt of other sizes than the
            prompts.
    """
    if "y" not in model_args:
        raise ValueError(f"model_args needs the text embeddings 'y', got the keys {sorted(model_args)}")
    text = model_args["y"]
    null = network.null_text(text)
    if drop is not None and bool(drop.any()):
        if null is None:
            raise ValueError("prompts cannot be dropped: the network has no null text; use the model's class_dropout_prob=0")
        text = torch.where(drop.to(text.device)[:, None, None, None], null, text)
    extras = network.accepted(model_args, _OWN_ARGUMENTS)
    condition = Condition(text, model_args.get("mask"), null, strict_null=null, extras=extras)
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
    return Condition(
        encoded["y"],
        encoded.get("mask"),
        null,
        null_mask,
        strict_null,
        reference,
        Interface.of(network).accepted(extras, _OWN_ARGUMENTS),
    )


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


def reference_frame_weights(reference: Reference, weight: float) -> Tensor:
    """Loss weights [B, T] that give each reference frame `weight` and keep the total at T."""
    batch_size, _, num_frames = reference.latents.shape[:3]
    count = len(reference.frames)
    other = (num_frames - count * weight) / (num_frames - count) if count < num_frames else 1.0
    weights = torch.full((batch_size, num_frames), other, device=reference.latents.device)
    weights[:, list(reference.frames)] = weight
    return weights
