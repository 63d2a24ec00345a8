"""What a training step says of itself beside its loss, at the cost of a few sums: numbers for the guard and the record.

The student's answer is one that the step needs anyway. All numbers of a step reach the CPU together, since each wait for a GPU
costs more than the sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from opensora_perflow.conventions import expand_like
from opensora_perflow.method.segment import Segment
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.training.adapters import adapters
from opensora_perflow.training.players import Batch

MOST_TENSORS, MOST_VALUES = 24, 512
"""Of a network's weights, evenly spaced, that stand for all of them."""


class WeightSample:
    """Some of a network's weights, and how far they move.

    Args:
        network: Wrapped or bare.
        trained: Prefer weights that are trained, or that are not.
        gradients: Also sum what their gradients are.
    """

    def __init__(self, network: nn.Module, *, trained: bool = True, gradients: bool = False) -> None:
        everything = [parameter for parameter in network.parameters() if parameter.numel() > 0]
        meant = [parameter for parameter in everything if parameter.requires_grad == trained] or everything
        self._parameters = meant[:: max(1, -(-len(meant) // MOST_TENSORS))]
        self._gradients: list[Tensor] = []
        self._last = self._values()
        if gradients:
            for parameter in self._parameters:
                if parameter.requires_grad:
                    parameter.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        self._gradients.append(gradient.detach().float().square().sum())

    def _values(self) -> Tensor | None:
        values = [p.detach().as_subclass(Tensor).reshape(-1) for p in self._parameters]
        values = [v[:: max(1, v.numel() // MOST_VALUES)].float() for v in values]
        return torch.cat(values) if values else None

    def moved(self) -> Tensor:
        """Length of the change since the last call, over the length of the weights: a number; NaN where it cannot be told."""
        now, last = self._values(), self._last
        self._last = now
        if now is None or now.shape != last.shape:  # without weights, or sharded by now
            return torch.full((), math.nan)
        return (now - last).norm() / last.norm().clamp(min=1e-12)

    def is_finite(self) -> bool:
        """Waits for the device."""
        values = self._values()
        return values is None or bool(torch.isfinite(values).all())

    def gradient_norm(self) -> Tensor:
        """Since the last call: a number; NaN where no gradient was seen."""
        seen, self._gradients = self._gradients, []
        return torch.stack(seen).sum().sqrt() if seen else torch.full((), math.nan)


@dataclass
class RecordedField:
    """The field of a step's student, and its first answer that has a graph: the window's line from x [B, ...] at t [B]."""

    field: Velocity
    first: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        v = self.field(x, t)
        if self.first is None and torch.is_grad_enabled():  # perflow_consistency also asks without, and first
            self.first = x, t, v
        return v

    def end(self, t_end: Tensor) -> Tensor:
        """Where the line leads at t_end [B]."""
        x, t, v = self.first
        return x + expand_like((t_end - t).to(x.device), x).to(v.dtype) * v


COLUMNS = (
    "loss",
    "window",
    "misplaced",
    "mean",
    "std",
    "motion",
    "own_mean",
    "own_std",
    "own_motion",
    "data_std",
    "data_motion",
)

SINGLE = ("grad_norm", "update", "ema_update", "teacher_update")


@dataclass(frozen=True)
class Vitals:
    """Of one step. Lists have one number a sample.

    loss, window: See there. misplaced: 1 where a drawn time lies outside the window that was drawn.
    mean, std, motion: Of the teacher's window ends; own_...: of the student's one-step ends. Motion is the temporal-difference
    energy, NaN for one frame.
    data_std, data_motion: Standard deviation of the latents around each channel's mean; their motion over their variance.
    grad_norm, update, ema_update, teacher_update: See `WeightSample`; of the step before.
    teacher_trains: Is the teacher in train mode?
    num_windows: Of the student.
    """

    num_windows: int
    loss: list[float]
    window: list[int]
    misplaced: list[float]
    mean: list[float]
    std: list[float]
    motion: list[float]
    own_mean: list[float]
    own_std: list[float]
    own_motion: list[float]
    data_std: list[float]
    data_motion: list[float]
    grad_norm: float = math.nan
    update: float = math.nan
    ema_update: float = math.nan
    teacher_update: float = math.nan
    teacher_trains: bool = False

    @cached_property
    def by_window(self) -> dict[str, list[float | None]]:
        """Means over the samples of each window, as the record names them; None where there is no sample.

        window_count: Samples. window_spread: The student's standard deviation in parts of the teacher's; window_motion: its
        motion, likewise. window_shift: How far its mean is from the teacher's, in the teacher's standard deviations.
        """
        rows: list[list[int]] = [[] for _ in range(self.num_windows)]
        for row, k in enumerate(self.window):
            rows[min(k, self.num_windows - 1)].append(row)
        values = {
            "loss": self.loss,
            "spread": [own / max(std, 1e-12) for own, std in zip(self.own_std, self.std)],
            "shift": [(own - mean) / max(std, 1e-12) for own, mean, std in zip(self.own_mean, self.mean, self.std)],
            "motion": [own / max(motion, 1e-12) for own, motion in zip(self.own_motion, self.motion)],
        }
        means = {
            f"window_{name}": [sum(each[i] for i in found) / len(found) if found else None for found in rows]
            for name, each in values.items()
        }
        return {**means, "window_count": [self.window.count(k) for k in range(self.num_windows)]}


class Instruments:
    """What measures a run's steps.

    Args:
        student: The network. teacher: Its teacher; None: stored chains. ema: Its average; None: none that is known.
        exact_windows: Do drawn times lie in the drawn window? Overlapping windows also train times above.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, ema: nn.Module | None = None, exact_windows: bool = True
    ) -> None:
        self._weights = [
            WeightSample(student, gradients=True),
            None if ema is None else WeightSample(ema),
            None if teacher is None else WeightSample(teacher, trained=False),
        ]
        self.exact_windows = exact_windows
        self.teacher = teacher

    def teach_by(self, teacher: nn.Module) -> None:
        """Another network teaches from here on."""
        self.teacher, self._weights[2] = teacher, WeightSample(teacher, trained=False)

    @property
    def weights_are_finite(self) -> bool:
        """Are the student's? A gradient that is not finite spoils all of them, so that a few tell."""
        return self._weights[0].is_finite()

    def forget_move(self) -> None:
        """Weights were put back: that is no update."""
        for weights in filter(None, self._weights):
            weights.moved()

    @torch.no_grad()
    def read(self, batch: Batch, segment: Segment, loss: Tensor, student: RecordedField) -> Vitals:
        """One step's numbers, which cost one wait for the device."""
        drawn, device = batch.drawn, loss.device
        t_start, t_end, times = segment.t_start, segment.t_end, drawn.times
        outside = (times > t_start) | (times < t_end) | (t_start <= t_end)
        misplaced = outside.any(dim=0) if self.exact_windows else torch.zeros_like(drawn.window_idx)
        own = segment.x_end if student.first is None else student.end(t_end)
        columns = [
            loss.detach(),
            drawn.window_idx,
            misplaced,
            *_shape(segment.x_end),
            *_shape(own),
            *data_variation(batch.data),
        ]
        table = torch.stack([column.to(device, torch.float32) for column in columns])
        unknown = torch.full((), math.nan)
        moves = [unknown if weights is None else weights.moved() for weights in self._weights]
        single = torch.stack([x.to(device) for x in (self._weights[0].gradient_norm(), *moves)])
        numbers = torch.cat([table.flatten(), single]).tolist()
        count = table.shape[1]
        lists = {name: numbers[i * count : (i + 1) * count] for i, name in enumerate(COLUMNS)}
        lists["window"] = [int(k) for k in lists["window"]]
        trains = self.teacher is not None and self.teacher.training and not adapters(self.teacher)
        single = dict(zip(SINGLE, numbers[-len(SINGLE) :]))
        return Vitals(batch.windows.windows.num_windows, **lists, **single, teacher_trains=trains)


def _shape(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.float().flatten(1)
    return rows.mean(dim=1), rows.std(dim=1, unbiased=False), motion(x)


def motion(x: Tensor) -> Tensor:
    """Temporal-difference energy [B] of latents [B, C, T, H, W]; NaN where there is one frame, or none."""
    if x.dim() != 5 or x.shape[2] < 2:
        return torch.full((len(x),), math.nan, device=x.device)
    return x.float().diff(dim=2).square().flatten(1).mean(dim=1)


def data_variation(data: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation of latents [B, C, ...] around each channel's mean, and their motion over their variance: [B] each."""
    rows = data.float().flatten(2) if data[0, 0].numel() > 1 else data.float().flatten(1)[:, None]
    variance = rows.var(dim=-1, unbiased=False).mean(dim=1)
    return variance.sqrt(), motion(data) / variance.clamp(min=1e-12)
