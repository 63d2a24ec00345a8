"""Open-Sora's networks (STDiT, STDiT2, STDiT3, and what shares their call) as fields of state and time.

One evaluation of the network may carry several branches of guidance. The batch is repeated, branch after branch, as the network
tiles the text mask (v1.2.0 opensora/models/stdit/stdit3.py:344). What v1.2 and v1.3 take differently is told from the signature
of forward.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from opensora_perflow.conventions import expand_like
from opensora_perflow.hosts.scale_input import told as told_inputs
from opensora_perflow.hosts.v1.conditions import Condition
from opensora_perflow.hosts.v1.network import Interface
from opensora_perflow.hosts.wrappers import forget_compiled, weights_dtype
from opensora_perflow.method.guidance import classifier_free, rescale_to_cond, text_and_image
from opensora_perflow.method.process import Linear, Output
from opensora_perflow.method.solvers import Velocity


class Branch(NamedTuple):
    """Which of the conditions one branch of guidance sees."""

    text: bool
    reference: bool


_QUIET_FROM_THE_START: WeakSet[nn.Module] = WeakSet()
"""Text embedders whose code for training was compiled while they dropped nothing, if it was compiled."""

FULL, NO_TEXT, NOTHING = Branch(True, True), Branch(False, True), Branch(False, False)


def network_output(
    call: Callable[..., Tensor],
    network: nn.Module,
    condition: Condition,
    *,
    rows: Tensor | None = None,
    frame_mask: Tensor | None = None,
    text_scale: float | Tensor = 1.0,
    image_scale: float | Tensor = 1.0,
    guided_channels: int | None = None,
    flaw_fix: bool = False,
    told: Tensor | None = None,
) -> Output:
    """The network under a condition, guided: what it outputs for states and timesteps, without its variance half.

    Args:
        call: What to call: the network, or the booster's wrapper around it (gradients and gathered weights need that one). See
            `without_text_dropout`.
        network: The network itself, to read its signature.
        condition: Text, reference frames and sizes for B samples.
        rows: Those of the samples that states are of, of a condition that is separable; None: all. All else is theirs alone.
        frame_mask: bool [B, T]; False marks frames that stand still at t = 0.
        text_scale: Classifier-free guidance by text, a number or one a sample [B]. 1 = none: one evaluation of B samples
            instead of two. A tensor always takes two.
        image_scale: Guidance by reference frames (a third branch), likewise, or anything that multiplies [B, C, T, H, W]; only
            with a reference.
        guided_channels: Text guidance acts on the first so many channels; the others are the conditional prediction's, as in
            upstream's iddpm (v1.1.0 opensora/schedulers/iddpm/__init__.py, forward_with_cfg). None: all.
        flaw_fix: Rescale the guided prediction (text guidance alone, as upstream).
        told: Guidance scales [B] that the network is told as an input, see hosts/scale_input.py; None: it takes none.

    Returns:
        output(x, timestep, step=None): x [B, C, T, H, W], timestep [B] -> [B, C, T, H, W], float32. `step`: Lengths of steps in
        flow time [B], which the network is told as an input.

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
    inputs = _network_inputs(network, condition, branches, rows, frame_mask)
    count = len(branches)

    def output(x: Tensor, timestep: Tensor, step: Tensor | None = None) -> Tensor:
        x_all, timestep = (torch.cat([value] * count) for value in (x, timestep.to(x.device)))
        if told is None and step is None:
            said = call(x_all, timestep, **inputs)
        else:
            with told_inputs(network, *(None if value is None else value.repeat(count) for value in (told, step))):
                said = call(x_all, timestep, **inputs)
        parts = halves(said, x.shape[1])[0].chunk(count)
        if len(parts) == 3:
            return text_and_image(*parts, _factor(text_scale, x), _factor(image_scale, x))
        if len(parts) == 2:
            guided = classifier_free(*parts, _factor(text_scale, x))
            if guided_channels is not None:
                guided = torch.cat([guided[:, :guided_channels], parts[0][:, guided_channels:]], dim=1)
            return rescale_to_cond(guided, parts[0]) if flaw_fix else guided
        return parts[0]

    return output


def velocity_field(
    call: Callable[..., Tensor], network: nn.Module, condition: Condition, *, num_timesteps: int, **settings: Any
) -> Velocity:
    """A rectified-flow network as the field dx/dt = velocity(x, t); its timesteps are t num_timesteps.

    Arguments, errors and `settings` as `network_output`.
    """
    quiet = without_text_dropout(call, Interface.of(network))
    return partial(Linear(num_timesteps).velocity, network_output(quiet, network, condition, **settings), "velocity", None)


def without_text_dropout(call: Callable[..., Tensor], network: Interface) -> Callable[..., Tensor]:
    """A network's call that keeps the network from dropping prompts on its own, unseen.

    Its own draw cannot be observed from outside, so the teacher could not be shown the same text. The draw also takes the CPU's
    random numbers and needs CUDA (v1.2.0 opensora/models/layers/blocks.py:731).
    """
    if "text_uncond_prob" in network.parameters:
        return partial(call, text_uncond_prob=0.0)
    embedder = network.embedder
    if getattr(embedder, "uncond_prob", None) is None:
        return call

    if network.network.training and embedder not in _QUIET_FROM_THE_START:
        _QUIET_FROM_THE_START.add(embedder)
        forget_compiled()

    def quiet(*inputs: Any, **named: Any) -> Tensor:
        probability, embedder.uncond_prob = embedder.uncond_prob, 0.0
        try:
            return call(*inputs, **named)
        finally:
            embedder.uncond_prob = probability

    return quiet


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


def idle_reference_embedders(network: nn.Module) -> Tensor | float:
    """0, with a gradient of 0 for the weights that embed reference frames (v1.3).

    A step without such frames leaves them out, as it is sampled; upstream adds what they make of zeros. But ZeRO reduces the
    gradients that there are, and each rank draws for itself whether a batch has reference frames (v1.3 scripts/train.py,
    mask_randgen). Added to the loss, this has all ranks reduce the same.
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
    network: nn.Module, condition: Condition, branches: Sequence[Branch], rows: Tensor | None, frame_mask: Tensor | None
) -> dict[str, Any]:
    made = condition.made.get((id(network), branches))
    if made is None:  # the text of a guided step has megabytes: concatenated once a sample, not once a step
        made = {**condition.extras, **_text_inputs(condition, branches)}
        if condition.reference is not None:
            made |= _reference_inputs(network, condition, branches)
        condition.made[id(network), branches] = made
    if rows is not None:
        made = _of_rows(made, rows, len(condition.text), len(branches))
    if frame_mask is None:
        return made
    if not Interface.of(network).accepted({"x_mask": frame_mask}):
        raise ValueError(f"{type(network).__name__} takes no frame mask (x_mask); leave out mask_ratios and references")
    return {**made, "x_mask": frame_mask.repeat(len(branches), 1)}


def separable(condition: Condition, batch_size: int) -> bool:
    """Can samples be told apart? Not in packed text."""
    batched = condition.text.dim() == 4 and len(condition.text) == batch_size
    masked = condition.text_mask is None or len(condition.text_mask) == batch_size
    return batched and masked and not any(isinstance(value, (list, tuple)) for value in condition.extras.values())


def _of_rows(made: dict[str, Any], rows: Tensor, batch_size: int, count: int) -> dict[str, Any]:
    """What some of the samples are told. Inputs hold all samples once, or once for each branch."""
    index = {batch_size: rows, count * batch_size: torch.cat([rows + k * batch_size for k in range(count)])}
    per_sample = {name: value for name, value in made.items() if isinstance(value, Tensor) and value.dim() > 0}
    cut = {name: value[index[len(value)].to(value.device)] for name, value in per_sample.items() if len(value) in index}
    return {**made, **cut}


def _text_inputs(condition: Condition, branches: Sequence[Branch]) -> dict[str, Any]:
    if any(not branch.text for branch in branches) and condition.null is None:
        raise ValueError(
            "guidance needs the network's null text (y_embedder.y_embedding), and this network has none for the text it is "
            'given (skip_y_embedder or pre-computed text features); use guidance=dict(mode="sync") with cfg_scale=1 or a '
            'teacher that needs no guidance: guidance=dict(mode="fixed", scale=1.0)'
        )
    y, mask = condition.text, condition.text_mask
    if len(branches) > 1:
        # Negative prompts and null text are float32 from the encoder, the text may be half precision: cat promotes.
        y = torch.cat([condition.text if branch.text else condition.null for branch in branches])
        if mask is not None and condition.null_mask is not None:
            mask = torch.cat([condition.text_mask if branch.text else condition.null_mask for branch in branches])
    return {"y": y} if mask is None else {"y": y, "mask": mask}


def _reference_inputs(network: nn.Module, condition: Condition, branches: Sequence[Branch]) -> dict[str, Any]:
    if "mask_index" not in Interface.of(network).parameters:
        raise ValueError(
            f"{type(network).__name__} takes no reference frames (mask_index); image and video conditioning needs the "
            "STDiT3 of Open-Sora 1.3"
        )
    latents, count = condition.reference.latents, len(branches)
    nothing = torch.zeros_like(latents)
    # The network casts x and y to its own precision, but not these (v1.3 opensora/models/stdit/stdit3.py:442 and 500).
    dtype = weights_dtype(network)
    return {
        "cond": torch.cat([latents if branch.reference else nothing for branch in branches]).to(dtype),
        "cond_mask": condition.reference.mask.repeat(count, 1, 1, 1, 1).to(dtype),
        "mask_index": list(condition.reference.frames),
        "y_null": condition.strict_null.repeat(count, 1, 1, 1).to(dtype),
    }
