"""The energy distance as an objective (benchmarks/energy.py): exact values of two samples, and its zero."""

import pytest
import torch
from energy import perflow_energy

from opensora_perflow.method.segment import Segment


def segment(x_end: torch.Tensor, edges: tuple[float, float] = (1.0, 0.5)) -> Segment:
    start, end = (torch.full((len(x_end),), edge, dtype=torch.float64) for edge in edges)
    return Segment(torch.zeros_like(x_end), x_end, start, end)


def samples(*values: float) -> torch.Tensor:
    """Each the same in all its elements, [B, 1, 3, 1, 1]."""
    return torch.tensor(values)[:, None, None, None, None].expand(-1, 1, 3, 1, 1).clone()


def test_the_teachers_own_ends_have_no_distance_and_no_gradient():
    bias = torch.zeros((), requires_grad=True)
    window = segment(torch.randn(5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    loss = perflow_energy(lambda x, t: window.velocity + bias, window, window.t_start, motion=1.0)
    loss.mean().backward()
    # float32: point and step are rounded, eps 1.2e-7 of sizes near 3
    torch.testing.assert_close(loss, torch.zeros(5), atol=2e-6, rtol=0)
    assert abs(bias.grad) < 2e-6


def test_two_samples_by_hand():
    """Windows end at 0 and 1, and are 1/2 long. Ends at 1 and 3: (|1 - 1| + |0 - 3| - |1 - 3| - |0 - 1|) / .5 = 0.

    Ends at 2 and 2: (|2 - 1| + |0 - 2| - 0 - |0 - 1|) / .5 = 4, for either sample.
    """
    window = segment(samples(0.0, 1.0))
    for ends, expected in ((samples(1.0, 3.0), 0.0), (samples(2.0, 2.0), 4.0)):
        loss = perflow_energy(lambda x, t, ends=ends: -ends / 0.5, window, window.t_start)
        torch.testing.assert_close(loss, torch.full((2,), expected), atol=1e-5, rtol=0)  # 1e-12 under the root: 1e-6 at 0


def test_samples_of_other_windows_are_no_pairs():
    both = Segment(
        torch.zeros(2, 1, 3, 1, 1),
        samples(0.0, 1.0),
        torch.tensor([1.0, 0.5], dtype=torch.float64),
        torch.tensor([0.5, 0.0], dtype=torch.float64),
    )
    assert perflow_energy(lambda x, t: x + 1.0, both, both.t_start).tolist() == [0.0, 0.0]


def test_frames_that_stand_still_are_refused():
    window = segment(samples(0.0, 1.0))
    with pytest.raises(ValueError, match="no frames that stand still"):
        perflow_energy(lambda x, t: x, window, window.t_start, torch.ones(2, 3))
