r"""Time, sign and shape: stated once; everything else refers to this page.

* Flow time `t` lies in [0, 1]: **t = 1 is noise, t = 0 is data**. Sampling runs downwards.
* The straight path is x_t = (1 - t) data + t noise. The velocity is dx/dt, so it points **from data to noise** (`noise - data`
  on the straight path). One Euler step is x + (t_next - t) v.
* A field is any callable `velocity(x, t)`: x is [B, ...], t is [B], the result is shaped like x.
* Latents are [B, C, T, H, W]; `num_frames` says how many pixel frames; times are [B], float64 until a network is called.
* Untransformed time `u` is what windows and sampling grids are cut in. Where the host warps time for large or long
  videos, t = shift_time(u, ratio) with a ratio [B] of each sample's own.

Open-Sora 1.2 and 1.3 count time as a float `timestep` in 0..num_timesteps. Their networks answer data - noise, which is
**minus** dx/dt (v1.2.0 opensora/schedulers/rf/rectified_flow.py, the training target x_start - noise).

Open-Sora 1.0 and 1.1 train another process, a diffusion, with integer timesteps and networks that answer the noise.
method/ddpm.py has that process, its times and its way to a velocity.
"""

from torch import Tensor


def expand_like(values: Tensor, like: Tensor) -> Tensor:
    """[..., B] -> [..., B, 1, ..., 1] in the dtype and on the device of `like` [B, ...], to be multiplied with it."""
    return values.to(like.device, like.dtype).reshape(*values.shape, *[1] * (like.dim() - 1))


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Point (1 - t) data + t noise of the straight path; data and noise [B, ...], t [B] in [0, 1]."""
    # 1 - t is formed in the precision of t (float64) and only then rounded to that of the latents.
    return expand_like(1.0 - t, data) * data + expand_like(t, noise) * noise


def shift_time(u: Tensor, ratio: Tensor | float | None) -> Tensor:
    """Warp untransformed time: t = r u / (1 + (r - 1) u). Fixes 0 and 1, increasing for r > 0; None leaves u as it is.

    Written as r u / (r u + (1 - u)), which is exact at both ends.

    Source: the timestep_transform of Open-Sora 1.2/1.3; the same map as the resolution shift of SD3 (arXiv:2403.03206,
    eq. 23).
    """
    return u if ratio is None else ratio * u / (ratio * u + (1.0 - u))


def unshift_time(t: Tensor, ratio: Tensor | float | None) -> Tensor:
    """Inverse of `shift_time`: u = t / (r - (r - 1) t), written as t / (t + r (1 - t))."""
    return t if ratio is None else t / (t + ratio * (1.0 - t))


def shift_grid(u: Tensor, batch_size: int, ratio: Tensor | None) -> Tensor:
    """Untransformed times [n] -> flow times of each of `batch_size` samples, [n, B]; `ratio` [B] as in `shift_time`."""
    return shift_time(u[:, None].expand(-1, batch_size), ratio)
