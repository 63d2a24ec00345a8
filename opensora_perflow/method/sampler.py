"""The few-step sampler: Euler steps over a grid of times, with frames that are kept or edited on the way."""

from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from opensora_perflow.conventions import expand_like, interpolate
from opensora_perflow.method.solvers import Velocity, euler_step

FieldAt = Callable[[int, "Tensor | None"], Velocity]
"""field_at(step, frame_mask) -> velocity(x, t): the field of one sampling step; frame_mask [B, T] is True where frames move."""


class FrameEdit:
    """Reference frames during sampling: frozen until the flow time falls to a frame's edit ratio, then noised and denoised.

    Args:
        edit_ratio: [B, T]; 1 = generate the frame, 0 = keep the reference, r in between = the frame joins at flow time r,
            noised to it. The network is told one time a sample, so a ratio between two grid points splits that step at r.
            Each such ratio of a sample costs one evaluation more. A ratio on the grid costs none.
        generator: Source of the noise. A sample of it is drawn every step, needed or not, as the host does, so that the
            same seed gives the same result.
        add_noise: (data, noise, t) -> the point of the path that frames join at; the straight path's if not given.

    Source: Open-Sora 1.2/1.3 opensora/schedulers/rf/__init__.py, RFLOW.sample, which splits no step. There a frame joins at the
    first grid point that is at most r, noised to that point's time. At 4 steps that is up to 1/4 away. The iddpm of every tag
    rounds the ratio down to a step of its own. Its last step adds noise to reference frames (ratio 0); here they stay as they
    are.
    """

    def __init__(
        self,
        edit_ratio: Tensor,
        generator: torch.Generator | None = None,
        add_noise: Callable[[Tensor, Tensor, Tensor], Tensor] = interpolate,
    ) -> None:
        # Compared in float32, where a ratio written as 0.7 and the grid's 1 - 3/10 are the same number.
        self._join_time = edit_ratio.float()
        self._joined = edit_ratio == 1
        self._generator = generator
        self._add_noise = add_noise

    def split(self, t: Tensor, t_next: Tensor) -> list[Tensor]:
        """The times [B] of a step from t to t_next: both, and the points in between at which frames join.

        A sample with fewer of those than another takes steps of length 0 at t first.
        """
        start, end = (time.to(self._join_time.device, torch.float32)[:, None] for time in (t, t_next))
        inside = (self._join_time < start) & (self._join_time > end)
        points = self._join_time.where(inside, start).sort(dim=1, descending=True).values
        repeated = torch.cat([inside.new_zeros(len(points), 1), points[:, 1:] == points[:, :-1]], dim=1)
        points = points.where(~repeated, start).sort(dim=1, descending=True).values
        return [t] + [point.to(t.device, t.dtype) for point in points.T[(points != start).any(dim=0)]] + [t_next]

    def open(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Before a step at times t [B]: the state with newly joined frames noised, and the mask [B, T] of moving frames."""
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
    """Carry noise to data with one Euler step per grid interval, or more where frames join inside it.

    One step a window is exact for a student whose windows are straight (PeRFlow, arXiv:2405.07510); further steps refine.

    Args:
        field_at: The field of each step, see `FieldAt`. Calls per step: 1, and 1 more for each time inside it at which frames
            of `edit` join.
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
        points = [t, t_next] if edit is None else edit.split(t, t_next)
        for start, end in zip(points, points[1:]):
            x_before, active = x, None
            if edit is not None:
                x, active = edit.open(x, start)
            if before_step is not None:
                x = before_step(x, start)
            x = euler_step(field_at(i, active), x, start, end)
            if edit is not None:
                x = edit.close(x, x_before, active)
    return x


def carry_to_windows(
    field_of: Callable[[int, Tensor | None], Velocity],
    noise: Tensor,
    edges: Tensor,
    window_idx: Tensor,
    *,
    whole: bool = False,
    way: list[Tensor] | None = None,
) -> Tensor:
    """Carry noise down to the noisy edge of each sample's window, one Euler step a window: states that a sampler meets.

    Args:
        field_of: field_of(k, rows) -> the student's field in window k for the samples `rows` [n]; None: for all.
        noise: State at t = 1, [B, ...], float32.
        edges: Window edges of each sample, [K + 1, B], float64, descending from 1 to 0.
        window_idx: [B], 0 is the noisiest window, whose start is the noise itself.
        whole: Samples that have arrived go along, and their results are dropped: for fields of the whole batch only.
        way: A list that is given the states after each step, of the samples that took it.

    Returns:
        States at edges[window_idx], shape and dtype of `noise`. Callers wrap in no_grad. Evaluations of single samples:
        sum(window_idx), or with `whole` B max(window_idx).
    """
    x, lengths = noise.clone(), expand_like(edges.diff(dim=0), noise)
    for k in range(int(window_idx.max())):
        rows = (window_idx > k).nonzero()[:, 0]
        if whole or len(rows) == len(x):
            stepped = x + lengths[k] * field_of(k, None)(x, edges[k])
            x[rows] = stepped[rows]
        else:
            stepped = x[rows] + lengths[k][rows] * field_of(k, rows)(x[rows], edges[k][rows])
            x[rows] = stepped
        if way is not None:
            way.append(stepped)
    return x
