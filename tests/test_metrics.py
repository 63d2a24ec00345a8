import pytest
import torch

from opensora_perflow.metrics import endpoint_error, energy_distance, temporal_difference_energy


def test_endpoint_error_is_the_root_mean_square():
    assert endpoint_error(torch.full((2, 3), 2.0), torch.zeros(2, 3)) == 2.0


def test_energy_distance_of_point_masses_is_twice_their_distance():
    x, y = torch.zeros(5, 4), torch.full((5, 4), 3.0)
    # Distance 6 in 4 dimensions, divided by sqrt(4).
    assert energy_distance(x, y) == pytest.approx(6.0)


def test_energy_distance_is_unbiased_for_equal_distributions():
    values = torch.tensor([energy_distance(*torch.randn(2, 50, 8)) for _ in range(100)])
    assert abs(values.mean().item()) < 4 * values.std().item() / 10  # four standard errors of 100 repeats


def test_pairing_does_not_hide_a_difference():
    x = torch.randn(200, 8)
    assert energy_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert energy_distance(x, x + 1.0) > 0.2


def test_too_few_or_unequal_samples_are_refused():
    with pytest.raises(ValueError, match="one shape and at least two samples"):
        energy_distance(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="one shape and at least two samples"):
        energy_distance(torch.zeros(3, 2), torch.zeros(4, 2))


def test_motion_energy():
    still = torch.ones(1, 2, 3, 4, 4)
    ramp = torch.arange(3.0)[None, None, :, None, None].expand(1, 2, 3, 4, 4) * 0.5
    assert temporal_difference_energy(still) == 0.0 and temporal_difference_energy(ramp) == 0.25
    assert temporal_difference_energy(still[:, :, :1]) == 0.0
