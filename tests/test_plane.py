"""The plane that a path is drawn in."""

import pytest
import torch

from opensora_perflow.planning.plane import in_plane


@pytest.mark.parametrize("turn", [1.0, -1.0])
def test_a_flat_path_keeps_its_coordinates(turn):
    """A path in a random plane of 60 dimensions, 5 long; what leaves the plane is dropped, and the wide side is up."""
    generator = torch.Generator().manual_seed(0)
    along, across, third = torch.linalg.qr(torch.randn(60, 3, dtype=torch.float64, generator=generator)).Q.T
    start = torch.randn(60, dtype=torch.float64, generator=generator)
    drawn = torch.tensor([[0, 0], [0.25, 0.5], [0.75, -0.125], [1, 0]], dtype=torch.float64)
    steps = torch.tensor([[0, 0], [0.5, -0.75]], dtype=torch.float64)

    def states(points, away=0.0):
        rows = start + 5 * (points[:, :1] * along + turn * points[:, 1:] * across + away * third)
        return rows.reshape(len(points), 1, 3, 4, 5)

    path, others = in_plane(states(drawn), states(steps, away=2.0))
    torch.testing.assert_close(path[0], drawn, rtol=0, atol=1e-12)  # algebra in float64
    torch.testing.assert_close(others[0], steps, rtol=0, atol=1e-12)


def test_a_straight_path_stays_on_its_axis():
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    path, _ = in_plane(times[:, None, None].expand(5, 2, 7) * 3.0, torch.zeros(1, 2, 7))
    torch.testing.assert_close(path, torch.stack([times, 0 * times], dim=1).expand(2, 5, 2), rtol=0, atol=1e-12)
