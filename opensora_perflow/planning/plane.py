"""Paths through a space of many dimensions, in a plane that shows how they bend."""

import torch
from torch import Tensor


@torch.no_grad()
def in_plane(path: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Project a path, and other states near the path, onto a plane of each sample's own.

    The first axis leads from the path's start to its end. The second is the direction across in which the path's states vary
    most, with the path's own widest place above 0. Both are in units of the distance from start to end.

    Args:
        path: States of a path from noise to its end, [M + 1, B, ...], M >= 1.
        others: [N, B, ...].

    Returns:
        The path [B, M + 1, 2] from (0, 0) to (1, 0), and the others [B, N, 2].
    """
    planes = [_plane(path[:, b].flatten(1).double(), others[:, b].flatten(1).double()) for b in range(path.shape[1])]
    own, near = zip(*planes)
    return torch.stack(own), torch.stack(near)


def _plane(path: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Of one sample: path [M + 1, D], others [N, D]."""
    start, along = path[0], path[-1] - path[0]
    length = along.norm().clamp(min=1e-12)
    along = along / length
    rows, near = (path - start) / length, (others - start) / length
    across = torch.linalg.svd(rows - (rows @ along)[:, None] * along, full_matrices=False).Vh[0]
    across = across - (across @ along) * along  # a straight path leaves it to chance
    heights = rows @ across
    if heights[heights.abs().argmax()] < 0:
        across = -across
    axes = torch.stack([along, across], dim=1)
    return rows @ axes, near @ axes
