"""Open-Sora 2.0's MMDiT as a field: what it is told besides state and time, under guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.conventions import expand_like
from opensora_perflow.hosts.scale_input import told as step_told
from opensora_perflow.hosts.v2.text import null_text
from opensora_perflow.hosts.v2.tokens import Layout
from opensora_perflow.method.guidance import classifier_free, text_and_image
from opensora_perflow.method.process import Output

Told = Mapping[str, Tensor]
"""Argument of the network -> what a batch's samples are told, [B, ...]: img_ids, txt, txt_ids, y_vec, cond, guidance."""


def without_reference(network: nn.Module, img: Tensor) -> Tensor:
    """The `cond` of samples without reference frames [B, L, D + p p]: zeros, the mask's channel included."""
    return img.new_zeros(*img.shape[:2], network.in_channels + network.patch_size**2)


def rows_of(told: Told, rows: Tensor) -> dict[str, Tensor]:
    """What some of the samples are told."""
    return {name: value[rows.to(value.device)] for name, value in told.items()}


def repeated(told: Told, count: int) -> dict[str, Tensor]:
    """What the samples are told, the batch so many times over."""
    return {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in told.items()}


def network_output(
    call: Callable[..., Tensor],
    told: Told,
    layout: Layout,
    dtype: torch.dtype,
    *,
    text_scale: float | Tensor = 1.0,
    image_scale: float | Tensor = 1.0,
) -> Output:
    """What the network says of latents, guided.

    Args:
        call: The network's forward.
        told, layout: Of a batch of B samples.
        dtype: The network's.
        text_scale: Classifier-free guidance by text, a number or one a sample [B]; 1 = none, one row a sample instead of two.
        image_scale: Guidance by reference frames, likewise, and a third row; no effect where no sample has any.

    Returns:
        output(x, t, step): x [B, C, T, H, W], t [B] in 0..1 -> noise - data, [B, C, T, H, W], float32. `step`: Lengths of the
        steps that begin at t, which the network is told, [B]; None: it is told none.

    Raises:
        ValueError: see text.null_text.
    """
    guided_by_text, guided_by_image = (isinstance(scale, Tensor) or scale != 1.0 for scale in (text_scale, image_scale))
    referred = "cond" in told and bool(told["cond"].any())
    count = 3 if referred and (guided_by_text or guided_by_image) else 2 if guided_by_text else 1
    rows = dict(told) if count == 1 else _branches(told, count)

    def output(x: Tensor, t: Tensor, step: Tensor | None = None) -> Tensor:
        tokens = layout.pack(x).to(dtype).repeat(count, 1, 1)
        steps = {} if step is None else {"step": step.repeat(count)}
        said = call(img=tokens, timesteps=t.to(x.device, dtype).repeat(count), **rows, **steps)
        parts = layout.unpack(said.as_subclass(Tensor).float()).chunk(count)
        if count == 1:
            return parts[0]
        text, image = (expand_like(scale, x) if isinstance(scale, Tensor) else scale for scale in (text_scale, image_scale))
        return classifier_free(*parts, text) if count == 2 else text_and_image(*parts, text, image)

    return output


def _branches(told: Told, count: int) -> dict[str, Tensor]:
    """Rows [text, no text] or [text, no text, neither text nor reference], in upstream's order."""
    null = null_text(dict(told))
    rows = {name: torch.cat([value] + [null.get(name, value)] * (count - 1)) for name, value in told.items()}
    if count == 3:
        cond = told["cond"]
        rows["cond"] = torch.cat([cond, cond, torch.zeros_like(cond)])
    return rows


def call_without_gradient(network: nn.Module) -> Callable[..., Tensor]:
    """The network's forward for evaluations without a gradient, past its hooks. `step`: See `network_output`.

    Open-Sora's checkpointing does not ask whether there is a gradient, and with a buffer of activations it would fill that.
    """

    def call(step: Tensor | None = None, **inputs: Any) -> Tensor:
        with torch.no_grad(), _without_checkpointing(network), nullcontext() if step is None else step_told(network, step=step):
            return network.forward(**inputs)

    return call


def call_as_asked(network: nn.Module) -> Callable[..., Tensor]:
    """The network's forward, past its hooks: with a gradient where one is enabled, and else as `call_without_gradient`."""
    plain = call_without_gradient(network)

    def call(**inputs: Any) -> Tensor:
        return network.forward(**inputs) if torch.is_grad_enabled() else plain(**inputs)

    return call


@contextmanager
def _without_checkpointing(network: nn.Module) -> Iterator[None]:
    modules = [module for module in network.modules() if getattr(module, "grad_checkpointing", False)]
    for module in modules:
        module.grad_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.grad_checkpointing = True
