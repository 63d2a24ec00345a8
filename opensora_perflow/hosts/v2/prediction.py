"""A network's answer that brings its own loss: Open-Sora 2.0's train.py compares answers itself, by F.mse_loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KEPT = (Tensor.float, Tensor.to, Tensor.clone, Tensor.contiguous)
"""What scripts and wrappers do to an answer before they compare: DDP with static_graph clones the first one."""


class Prediction(Tensor):
    """The student's answer. F.mse_loss(prediction, target) is `loss`, whatever the target is.

    loss: A scalar with the student's graph. told: Called with the script's target, once. compared: [True] from then on.
    """

    loss: Tensor
    told: Callable[[Tensor], None]
    compared: list[bool]

    @classmethod
    def of(cls, output: Tensor, loss: Tensor, told: Callable[[Tensor], None]) -> Prediction:
        """Answers with a graph refuse to be trained on without having been compared, before any optimizer's step."""
        compared = [False]

        def refuse(gradient: Tensor) -> None:
            if not compared[0]:
                raise RuntimeError(
                    "the student's answer was trained on without its PeRFlow loss: F.mse_loss has not seen the answer. "
                    "Open-Sora 2.0's own train.py with its zero1, zero2 and hybrid plugins works; wrappers that make another "
                    "tensor of a network's output do not"
                )

        if output.requires_grad:  # a frozen student is told of by `told`
            output.register_hook(refuse)
        prediction = output.as_subclass(cls)
        prediction.loss, prediction.told, prediction.compared = loss, told, compared
        return prediction

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.mse_loss and isinstance(args[0], cls):
            prediction, target = args[0], args[1] if len(args) > 1 else kwargs["target"]
            if not prediction.compared[0]:
                prediction.compared[0] = True
                prediction.told(target.detach())
            return prediction.loss
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
        if function in KEPT and isinstance(args[0], cls):
            result = result.as_subclass(cls)
            result.loss, result.told, result.compared = args[0].loss, args[0].told, args[0].compared
        return result
