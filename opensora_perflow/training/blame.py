"""Who is to blame where a step's numbers are not finite: what came in, then the student, then the teacher.

NaN spreads to whatever is computed from it, so that the first in the order of a step is the cause. A good step pays one look at
the teacher's ends and one at the losses. All else is looked at only where one of those is not finite. No network is called
again: a call on one process alone would wait for the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from opensora_perflow.training.players import Batch

TEXT, TEXT_MASK = "the text embeddings", "the text's mask"
"""Names in what `Batch.inputs` gives of what samples are told in words, [B, ...]."""


class NotFinite(ValueError):
    """NaN or infinity, first seen in what the student or the teacher returned.

    who: "the student" or "the teacher". where: Which one, or where in the step. bad: Which samples, bool [B]. t_start, t_end:
    The windows, [B]. advice: What to look at.
    """

    def __init__(self, who: str, where: str, bad: Tensor, t_start: Tensor, t_end: Tensor, advice: str) -> None:
        self.who, self.bad, self.t_start, self.t_end, self.advice = who, bad.cpu(), t_start, t_end, advice
        self.found = f"{who} ({where}) returned"
        super().__init__(self.text(self.found, f"; {advice}"))

    def text(self, found: str, rest: str, bad: Tensor | None = None) -> str:
        """What is said: `found` NaN or infinity, in which windows, and the `rest`."""
        bad = self.bad if bad is None else bad
        return f"{found} NaN or infinity for {int(bad.sum())} of {len(bad)} samples, in the windows {self._windows(bad)}{rest}"

    def _windows(self, bad: Tensor) -> str:
        pairs = zip(self.t_start.cpu()[bad].tolist(), self.t_end.cpu()[bad].tolist())
        return ", ".join(f"t {a} -> {b}" for a, b in sorted({(round(a, 4), round(b, 4)) for a, b in pairs}, reverse=True))


def bad_solution(states: Sequence[Tensor] | Tensor, times: Tensor, source: str) -> NotFinite:
    """Of a teacher's solution that is not finite at its end; states [S + 1, B, ...], times [S + 1, B]."""
    advice = "check its weights (teacher.from_pretrained), the latents' scale, and use dtype bf16 instead of fp16"
    return NotFinite("the teacher", source, _bad(states[-1]), times[0], times[-1], advice)


def check_way(way: Sequence[Tensor], route: Tensor, window_idx: Tensor) -> None:
    """Raises NotFinite where the student's states on its way to the windows are not; called where the end is not.

    Args:
        way: The states after each step, one a window: of the whole batch [B, ...], or of the samples still on their way.
        route: Times of those steps, [R + 1, B].
        window_idx: Window of each sample, [B]: steps from there on were dropped.
    """
    for k, state in enumerate(way):
        on_its_way = (window_idx > k).cpu()
        bad = torch.zeros_like(on_its_way)
        bad[on_its_way] = _bad(state)[on_its_way] if len(state) == len(bad) else _bad(state)
        if bad.any():
            raise NotFinite("the student", "on its way to a window's start", bad, route[k], route[k + 1], STUDENT_ADVICE)


def bad_loss(batch: Batch, loss: Tensor) -> NotFinite:
    """Of losses [B] that are not finite; the teacher's ends were, see `bad_solution`."""
    return NotFinite("the student", "in the loss", _bad(loss), batch.drawn.t_start, batch.drawn.t_end, STUDENT_ADVICE)


STUDENT_ADVICE = "look at the steps before: loss, gradient norm, learning rate, grad_clip, and fp16 where bf16 would do"


def explained(error: NotFinite, batch: Batch, step: int, networks: Mapping[str, nn.Module]) -> ValueError:
    """The error that the script gets: what came in is looked at first, and the step is named.

    Args:
        batch: What the host handed over.
        step: Training steps so far, this one included.
        networks: "the student" and "the teacher": is it their weights?
    """
    where = f", at training step {step}"
    for name, value in _inputs(batch):
        if not _finite(value):
            bad = _bad(value, len(error.bad))
            return ValueError(error.text(f"{name}, an input of this step: it holds", f"{where}; {_remedy(name)}", bad))
    network = networks[error.who]
    broken = [name for name, value in network.named_parameters() if not _finite(value)]
    weights = f"; {len(broken)} of its weights are not finite, {broken[0]} the first" if broken else "; its weights are finite"
    return ValueError(error.text(error.found, f"{where}{weights}; {error.advice}"))


def _inputs(batch: Batch) -> Iterator[tuple[str, Any]]:
    """Name and value of everything that a step starts from, in order."""
    yield "the latents", batch.data
    yield "the noise", batch.noise
    yield from batch.inputs().items()
    yield "the guidance scale", batch.scale
    yield "the loss weight of a time", batch.drawn.weights.T
    if batch.frame_weights is not None:
        yield "the loss weight of a frame", batch.frame_weights


def _remedy(name: str) -> str:
    if name == "the latents":
        return "check the VAE, its precision and the video files"
    return "check the config" if "scale" in name or "weight" in name else "check what the data set and text encoder hand over"


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        # as_subclass: boosters put classes on weights whose comparisons are their own.
        return not value.is_floating_point() or bool(torch.isfinite(value.detach().as_subclass(Tensor)).all())
    return not isinstance(value, float) or math.isfinite(value)


def _bad(value: Any, count: int | None = None) -> Tensor:
    """Samples that are not finite, bool [B]; all `count` of them where the value is none of a sample's own."""
    own = isinstance(value, Tensor) and value.dim() > 0 and (count is None or len(value) == count)
    if not own:
        return torch.ones(count, dtype=torch.bool)
    return ~torch.isfinite(value.detach()).reshape(len(value), -1).all(dim=1).cpu()
