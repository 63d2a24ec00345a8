import pytest
import torch

from opensora_perflow import conventions as c


def test_ends_of_the_path_are_data_and_noise():
    data, noise = torch.randn(2, 3, 2, 2, 2)
    assert torch.equal(c.interpolate(data, noise, torch.zeros(3, dtype=torch.float64)), data)
    assert torch.equal(c.interpolate(data, noise, torch.ones(3, dtype=torch.float64)), noise)


def test_velocity_points_from_data_to_noise():
    data, noise = torch.randn(2, 3, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x_next = c.interpolate(data, noise, t + 1e-3)
    # The path is straight: a finite difference is its derivative up to rounding (1e-16 / 1e-3).
    torch.testing.assert_close((x_next - c.interpolate(data, noise, t)) / 1e-3, noise - data, atol=1e-11, rtol=0)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 5.1])
def test_shift_fixes_the_ends_and_has_an_inverse(ratio):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    r = torch.full_like(u, ratio)
    t = c.shift_time(u, r)
    assert t[0] == 0 and t[-1] == 1
    assert (t.diff() > 0).all()
    torch.testing.assert_close(c.unshift_time(t, r), u, atol=1e-14, rtol=0)  # a few float64 roundings


def test_no_ratio_is_no_shift():
    u = torch.rand(5)
    assert c.shift_time(u, None) is u and c.unshift_time(u, None) is u
