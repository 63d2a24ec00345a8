"""How samples are compared: with a reference from the same noise, and as distributions."""

import torch
from torch import Tensor


def endpoint_error(x: Tensor, reference: Tensor) -> float:
    """Root mean square difference of samples [B, ...] from a reference that started at the same noise."""
    return (x - reference).float().square().mean().sqrt().item()


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'|, with distances divided by the square root of the dimension.

    Args:
        x, y: Samples [N, ...] of the same number and shape, N >= 2. They may be paired (the same noise). Only pairs of
            different index count, in all three terms: pairing lowers the variance and adds no bias.

    Returns:
        An unbiased estimate: 0 for equal distributions up to sampling noise, which can make it slightly negative.

    Raises:
        ValueError: sets of different shape, or fewer than two samples.

    Source: Szekely and Rizzo, Energy statistics (2013), eq. 2.
    """
    if x.shape != y.shape or len(x) < 2:
        raise ValueError(f"energy distance needs two sets of one shape and at least two samples, got {x.shape}, {y.shape}")
    x, y = x.flatten(1).double(), y.flatten(1).double()

    def mean_distance(a: Tensor, b: Tensor) -> Tensor:
        distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / a.shape[1] ** 0.5
        distances.fill_diagonal_(0.0)
        return distances.sum() / (len(a) * (len(a) - 1))

    return (2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)).item()


def temporal_difference_energy(video: Tensor) -> float:
    """Mean square of the difference between neighbouring frames of [B, C, T, H, W]: how much moves. 0 for one frame."""
    return video.float().diff(dim=2).square().mean().item() if video.shape[2] > 1 else 0.0
