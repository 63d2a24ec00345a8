"""The few-step sampler: Euler steps over a grid of times, with frames that are kept or edited on the way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from opensora_perflow.conventions import interpolate
from opensora_perflow.solvers import Velocity, euler_step

FieldAt = Callable[[int, "Tensor | None"], Velocity]
"""field_at(step, frame_mask) -> velocity(x, t): the field of one sampling step; frame_mask [B, T] is True where frames move."""


class FrameEdit:
    """Reference frames during sampling: frozen until the flow time falls to a frame's edit ratio, then noised and denoised.

    Args:
        edit_ratio: [B, T]; 1 = generate the frame, 0 = keep the reference, r in between = the frame joins at the first
            step whose time is at most r, noised to that step's time.
        generator: Source of the noise. A sample of it is drawn every step, needed or not, as the host does, so that the
            same seed gives the same result.
        add_noise: (data, noise, t) -> the point of the path that frames join at; the straight path's if not given.

    Source: Open-Sora 1.2/1.3 opensora/schedulers/rf/__init__.py, RFLOW.sample. The iddpm of every tag rounds the ratio down to
    a step of its own and adds noise to reference frames (ratio 0) in its last step; here they stay as they are.
    """

    def __init__(
        self,
        edit_ratio: Tensor,
        generator: torch.Generator | None = None,
        add_noise: Callable[[Tensor, Tensor, Tensor], Tensor] = interpolate,
    ) -> None:
        self._join_time = edit_ratio.float()
        self._joined = edit_ratio == 1
        self._generator = generator
        self._add_noise = add_noise

    def open(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Before a step at times t [B]: the state with newly joined frames noised, and the mask [B, T] of moving frames."""
        # Compared in float32, where a ratio written as 0.7 and the grid's 1 - 3/10 are the same number.
        active = self._join_time >= t.to(x.device).float()[:, None]
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=self._generator)
        joining = (active & ~self._joined)[:, None, :, None, None]
        self._joined = active
        return torch.where(joining, self._add_noise(x, noise, t), x), active

    @staticmethod
    def close(x: Tensor, x_before: Tensor, active: Tensor) -> Tensor:
        """After a step: frames that do not move are what they were before it."""
        return torch.where(active[:, None, :, None, None], x, x_before)


def sample(
    field_at: FieldAt,
    x: Tensor,
    times: Tensor,
    *,
    edit: FrameEdit | None = None,
    before_step: Callable[[Tensor, Tensor], Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    """Carry noise to data with one Euler step per grid interval.

    One step a window is exact for a student whose windows are straight (PeRFlow, arXiv:2405.07510); further steps refine.

    Args:
        field_at: The field of each step, see `FieldAt`. Calls per step: 1.
        x: Noise at times[0] (reference frames already in place if `edit` is given), [B, C, T, H, W] or [B, ...], float32.
        times: [N + 1, B], float64, descending from 1 to 0.
        edit: Which frames are kept or edited; None generates everything.
        before_step: Optional map (x, t) -> x applied before each step (SDEdit-like conditioning).
        progress: Show a tqdm bar over the steps.

    Returns:
        Data at times[-1], shape and dtype of `x`.
    """
    steps = list(zip(times, times[1:]))
    for i, (t, t_next) in enumerate(tqdm(steps, desc="sampling", disable=not progress)):
        x_before, active = x, None
        if edit is not None:
            x, active = edit.open(x, t)
        if before_step is not None:
            x = before_step(x, t)
        x = euler_step(field_at(i, active), x, t, t_next)
        if edit is not None:
            x = edit.close(x, x_before, active)
    return x


def carry_to_windows(velocity: Velocity, noise: Tensor, edges: Tensor, window_idx: Tensor) -> Tensor:
    """Carry noise down to the noisy edge of each sample's window, one Euler step a window: states that a sampler meets.

    Args:
        velocity: The student's field; called max(window_idx) times with the whole batch. Samples that have arrived go along,
            so that every call has the batch its condition was made for, and their results are dropped.
        noise: State at t = 1, [B, ...], float32.
        edges: Window edges of each sample, [K + 1, B], float64, descending from 1 to 0.
        window_idx: [B], 0 is the noisiest window, whose start is the noise itself.

    Returns:
        States at edges[window_idx], shape and dtype of `noise`. Callers wrap in no_grad.
    """
    x = noise
    for k in range(int(window_idx.max())):
        on_its_way = (window_idx > k).to(x.device).reshape(-1, *[1] * (x.dim() - 1))
        x = torch.where(on_its_way, euler_step(velocity, x, edges[k], edges[k + 1]), x)
    return x
