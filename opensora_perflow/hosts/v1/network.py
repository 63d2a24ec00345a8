"""Networks of Open-Sora 1.x: what their forward accepts, their null text and text dropout."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.wrappers import unwrap


def one_graph_a_step(call: Callable[..., Tensor], network: nn.Module) -> Callable[..., Tensor]:
    """A network's call for one training step of Open-Sora 1.0 or 1.1: as it is, unless the network checkpoints gradients.

    They checkpoint re-entrantly (v1.1.0 opensora/acceleration/checkpoint.py:21), and ZeRO's hooks then meet a parameter's
    gradient once for each evaluation, of which they bear one.

    Raises:
        ValueError: at a second evaluation that has a gradient.
    """
    if not getattr(network, "grad_checkpointing", False):
        return call
    evaluations = 0

    def counted(*inputs: Any, **named: Any) -> Tensor:
        nonlocal evaluations
        evaluations += torch.is_grad_enabled()
        if evaluations > 1:
            raise ValueError(
                "with grad_checkpoint=True Open-Sora 1.0 and 1.1 train one evaluation of the student a step, and this config "
                'takes more; use draws=dict(per_solve=1) and objectives that share one evaluation (not "perflow_consistency" '
                "beside another), or grad_checkpoint=False"
            )
        return call(*inputs, **named)

    return counted


@lru_cache
def _signature(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters


@dataclass(frozen=True)
class Interface:
    """How a network wants to be called; `of` asks any network, and a step asks once.

    network: Bare. parameters: Of its forward. embedder: Its y_embedder, bare, or None.
    projected: Is it fed text that the embedder has already projected and packed (v1.2's and v1.3's skip_y_embedder)?
    text_dropout: Probability with which it would drop a prompt by itself: 0 outside training mode, and for projected text. That
    passes by the embedder, where the dropout is (v1.2.0 opensora/models/stdit/stdit3.py:383).
    """

    network: nn.Module
    parameters: Mapping[str, inspect.Parameter]
    embedder: nn.Module | None
    projected: bool
    text_dropout: float

    @classmethod
    def of(cls, model: nn.Module) -> Interface:
        """Of a network, bare or in any wrappers, whose own forward takes everything."""
        network = unwrap(model)
        embedder = getattr(network, "y_embedder", None)
        # The function behind the bound method: it is the same at every access, and it does not keep the network alive.
        parameters = _signature(getattr(network.forward, "__func__", network.forward))
        projected = bool(getattr(getattr(network, "config", None), "skip_y_embedder", False))
        embedder = embedder if embedder is None else unwrap(embedder)
        dropout = float(getattr(embedder, "uncond_prob", 0.0)) if network.training and not projected else 0.0
        return cls(network, parameters, embedder, projected, dropout)

    def accepted(self, arguments: Mapping[str, Any], without: Sequence[str] = ()) -> dict[str, Any]:
        """Those of the arguments that forward takes by keyword, but those named in `without`.

        STDiT2 has no **kwargs, STDiT3 has.
        """
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self.parameters.values())
        return {k: value for k, value in arguments.items() if k not in without and (takes_all or k in self.parameters)}

    def null_text(self, like: Tensor) -> Tensor | None:
        """The network's embedding of the empty prompt, expanded to `like` [B, 1, L, D]; None if the network has none for it.

        A network with skip_y_embedder is fed projected, packed text, for which it has no null.
        """
        embedding = getattr(self.embedder, "y_embedding", None)
        if embedding is None or self.projected:
            return None
        if like.dim() != 4 or tuple(like.shape[2:]) != tuple(embedding.shape):
            raise ValueError(
                f"text embeddings must be [B, 1, {', '.join(map(str, embedding.shape))}] for this network, got "
                f"{list(like.shape)}; the text encoder's model_max_length and output_dim must be the network's"
            )
        return embedding.detach().to(like.device, like.dtype).expand_as(like)
