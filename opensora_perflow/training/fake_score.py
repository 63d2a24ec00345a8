"""Distribution matching beside the regression: adapters on the frozen teacher learn the score of what the student makes.

With its adapters off the teacher gives the score of its own samples (real), with them on that of the student's (fake). The
difference moves the student's ends of windows, see method/matching.py. The adapters have an optimizer of their own, which
steps inside the training step. Their state lies beside perflow.json. A student of adapters (LoRA) shares one network with its
teacher; this score's adapters are then a second set on the same layers, and one set is on at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora_perflow.checkpoints import read_state_dict, write_state_dict
from opensora_perflow.conventions import expand_like
from opensora_perflow.method.matching import Renoised, renoise
from opensora_perflow.method.segment import Segment, mean_over_frames
from opensora_perflow.training.adapters import adapters, as_teacher, is_added
from opensora_perflow.training.host import Host
from opensora_perflow.training.matching import MatchingSettings
from opensora_perflow.training.players import Batch
from opensora_perflow.training.segments import held

logger = logging.getLogger("opensora_perflow")

FILE_NAME = "matching.safetensors"
"""In a checkpoint folder."""
PARTS = ("down", "up")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""


class FakeScore:
    """The frozen teacher as a score of the student's window ends.

    Args:
        network: The teacher, which gets hooks on its linear layers, and stays bit-equal while they are off.
        settings: See there.
    """

    def __init__(self, network: nn.Module, settings: MatchingSettings) -> None:
        self.settings, self.is_on = settings, False
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}
        self._shared = network if adapters(network) else None
        # A copy of a student has this attribute, switched off, where the student checkpoints gradients. The student's own
        # network checkpoints them as it does.
        copied = [] if self._shared is not None else network.modules()
        self._checkpointed = [module for module in copied if hasattr(module, "grad_checkpointing")]
        generator = torch.Generator().manual_seed(0)  # the same in all processes
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Linear) and not is_added(f"{name}.weight"):
                down = torch.randn(settings.rank, layer.in_features, generator=generator) / layer.in_features**0.5
                up = torch.zeros(layer.out_features, settings.rank)
                self.weights[name] = tuple(part.to(layer.weight.device).requires_grad_() for part in (down, up))
                layer.register_forward_hook(partial(self._add, *self.weights[name]))
        self.optimizer = torch.optim.AdamW([weight for _, _, weight in self._named()], settings.rate, weight_decay=0.0)

    def _add(self, down: Tensor, up: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.is_on:
            return None
        return output + (inputs[0].float() @ down.T @ up.T).to(output.dtype)

    @contextmanager
    def on(self, checkpointing: bool = False) -> Iterator[None]:
        """The teacher with its adapters. `checkpointing`: Gradients are checkpointed, where the student's are."""
        self._switch(True, checkpointing)
        try:
            with nullcontext() if self._shared is None else as_teacher(self._shared):
                yield
        finally:
            self._switch(False, False)

    def _switch(self, is_on: bool, checkpointing: bool) -> None:
        self.is_on = is_on
        for module in self._checkpointed:
            module.grad_checkpointing = checkpointing

    def velocity(self, batch: Batch, state: Renoised) -> Tensor:
        """The fake score's velocity at a state, told what the student is told, unguided; while the adapters are on."""
        return batch.players.untrained().velocity(None)(state.x, state.t)

    def fit(self, batch: Batch, x_end: Tensor, t_end: Tensor, generator: torch.Generator, host: Host) -> None:
        """Take the optimizer's steps towards the score of the student's ends x_end [B, ...] at t_end [B]."""
        weights = [weight for _, _, weight in self._named()]
        for _ in range(self.settings.updates):
            state = _renoised(batch, x_end, t_end, generator)
            # Zeros where a layer is not asked: processes may differ in that, and average all the same.
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            with self.on(checkpointing=True):  # the backward may repeat the forward
                error = state.error(self.velocity(batch, state), x_end)
                mean_over_frames(error.square(), batch.frame_weights).mean().backward()
            host.average([weight.grad for weight in weights])
            self.optimizer.step()

    @torch.no_grad()
    def gap(self, batch: Batch, x_end: Tensor, t_end: Tensor, generator: torch.Generator) -> Tensor:
        """Fake less real mean, over the real one's distance from x_end [B, ...]: moved against it, ends are the teacher's."""
        state = _renoised(batch, x_end, t_end, generator)
        real = state.mean_before(batch.players.teacher(batch.scale).velocity(None)(state.x, state.t))
        with self.on():
            fake = state.mean_before(self.velocity(batch, state))
        size = mean_over_frames((x_end - real).abs(), batch.frame_weights).clamp(min=1e-6)
        return (fake - real) / expand_like(size, x_end)

    def term(self, batch: Batch, segment: Segment, end: Tensor, generator: torch.Generator, host: Host) -> Tensor:
        """What is added to the losses [B]: nothing, but for the gradient of the matching.

        Args:
            end: Where the student leads at the window's clean edge, [B, ...], with its graph.
            generator: Of this step, for nothing else.

        Raises:
            ValueError: the adapters diverged.
        """
        x_end, t_end = end.detach(), segment.t_end
        self.fit(batch, x_end, t_end, generator, host)
        gap = self.gap(batch, x_end, t_end, generator)
        # An error of the velocity is one of the end over the window's length; the regression's gradient is of the former.
        length = expand_like(segment.t_start - t_end, end)
        product = self.settings.weight * mean_over_frames(gap * end / length**2, batch.frame_weights)
        if not torch.isfinite(product.detach()).all():  # the student's end was, see run.learn
            raise ValueError(
                f"matching's adapters diverged: with matching.rate={self.settings.rate:g} their score is not finite any more; "
                "use a lower matching.rate or matching.updates"
            )
        return product - product.detach()

    @torch.no_grad()
    def keep_state(self) -> Callable[[], None]:
        """A copy of the adapters and of their optimizer's state. Returns what puts both back."""
        weights = [weight.detach().clone() for _, _, weight in self._named()]
        moments = deepcopy(self.optimizer.state_dict())

        @torch.no_grad()
        def put_back() -> None:
            for (_, _, weight), copy in zip(self._named(), weights):
                weight.copy_(copy)
            self.optimizer.load_state_dict(deepcopy(moments))

        return put_back

    def save(self, folder: Path) -> None:
        """Write adapters and the state of their optimizer into a checkpoint folder, atomically."""
        state: dict[str, Tensor] = {}
        for name, part, weight in self._named():
            state[f"{name}.{part}"] = weight
            kept = self.optimizer.state.get(weight, {})
            state.update({f"{name}.{part}.{moment}": kept[moment] for moment in MOMENTS if moment in kept})
        write_state_dict(folder / FILE_NAME, state)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; with new adapters where it wrote nothing.

        Raises:
            ValueError: adapters of another network or rank.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            logger.warning("PeRFlow's matching begins with new adapters: there is no %s", path)
            return
        state = read_state_dict(path)
        wrong = [name for name, part, weight in self._named() if _shape(state, f"{name}.{part}") != list(weight.shape)]
        if wrong:
            raise ValueError(
                f"{path} has other adapters than matching.rank={self.settings.rank} gives this network ({wrong[0]} is the "
                "first that differs); set matching as it was, or remove the file to begin with new adapters"
            )
        for name, part, weight in self._named():
            own = f"{name}.{part}"
            weight.data.copy_(state[own])
            kept = {moment: state[f"{own}.{moment}"] for moment in MOMENTS if f"{own}.{moment}" in state}
            if kept:
                self.optimizer.state[weight] = {m: v if m == "step" else v.to(weight.device) for m, v in kept.items()}

    def _named(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, pair in self.weights.items():
            yield from ((name, part, weight) for part, weight in zip(PARTS, pair))


def _renoised(batch: Batch, x_end: Tensor, t_end: Tensor, generator: torch.Generator) -> Renoised:
    """A state that is noised again; frames that stand still stay where training holds them."""
    state = renoise(x_end, t_end, generator)
    return Renoised(held(batch, state.x), state.t, state.t_end)


def _shape(state: dict[str, Tensor], name: str) -> list[int] | None:
    return list(state[name].shape) if name in state else None
