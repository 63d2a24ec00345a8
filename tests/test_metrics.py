import pytest
import torch
from measures import (
    Resampled,
    drift,
    energy_estimate,
    error_estimate,
    nearest_clip_distance,
    seam,
    squared_errors,
    times_drawn,
)

from opensora_perflow.method.metrics import endpoint_error, energy_distance, temporal_difference_energy


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


def test_identical_later_loops_do_not_drift_whatever_the_first_is():
    first, later = torch.randn(2, 40, 2, 3)
    found = drift(torch.stack([first, later, later, later])).estimate
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_drift_is_the_mean_energy_distance_of_later_loops_to_the_second():
    second = torch.randn(40, 2, 3)
    clips = torch.stack([torch.randn(40, 2, 3), second, second + 2.0, second - 1.0])
    expected = (energy_distance(second + 2.0, second) + energy_distance(second - 1.0, second)) / 2
    assert drift(clips).value.item() == pytest.approx(expected, abs=1e-6)  # float32
    far = torch.stack([torch.zeros(5, 4), torch.zeros(5, 4), torch.full((5, 4), 3.0)])
    assert drift(far).value.item() == pytest.approx(6.0)
    with pytest.raises(ValueError, match="at least three loops, got 2"):
        drift(far[:2])


def test_measures_are_averaged_and_compared_resample_by_resample():
    a, b = (Resampled(torch.tensor(value), torch.tensor([value, 2 * value])) for value in (1.0, 3.0))
    mean, gap = Resampled.mean([a, b]), b - a
    assert (mean.value.item(), mean.resampled.tolist()) == (2.0, [2.0, 4.0])
    assert (gap.value.item(), gap.resampled.tolist()) == (2.0, [2.0, 4.0])


def test_a_seam_is_the_step_at_the_joint_over_the_steps_inside():
    video = torch.tensor([0.0, 1.0, 2.0, 5.0, 6.0, 7.0, 10.0])[None, None, :, None, None]
    assert seam(video, [3, 6]).value.item() == pytest.approx(9.0)  # steps of 3 against steps of 1
    assert seam(2 * video, [3]).value.item() == pytest.approx(9 / ((4 * 1 + 9) / 5))
    assert seam(torch.arange(5.0)[None, None, :, None, None], [2]).value.item() == pytest.approx(1.0)
    # Energies are averaged before they are divided: (9 + 0) / (1 + 3), not the mean of 9 and 0.
    two = torch.cat([video, torch.tensor([0.0, 2.0, 0.0, 0.0, 1.0, 0.0, 0.0])[None, None, :, None, None]])
    assert seam(two, [3, 6]).value.item() == pytest.approx(9 / (1 + (4 + 4 + 1 + 1) / 4))
    assert set(seam(two[:1].repeat(2, 1, 1, 1, 1), [3, 6]).resampled.tolist()) == {9.0}


@pytest.mark.parametrize("joints", [[], [0], [7], [1, 2, 3, 4, 5, 6]])
def test_a_seam_needs_joints_and_an_inside(joints):
    with pytest.raises(ValueError, match=r"joints must be some of the frames 1..6, and not all of them"):
        seam(torch.zeros(1, 1, 7, 1, 1), joints)


def test_nearest_clip_distance_is_zero_where_clips_repeat():
    a, b, c = (torch.full((2, 3, 4), value) for value in (0.0, 1.0, 5.0))
    assert nearest_clip_distance(torch.stack([a, b, a, b])).value == 0.0
    assert nearest_clip_distance(torch.stack([a, b, c])).value.item() == pytest.approx((1 + 1 + 4) / 3)
    # Only a video's own clips count: here the second video never moves.
    found = nearest_clip_distance(torch.stack([a, torch.stack([b[0], a[0]])])).estimate
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_nearest_clip_distance_needs_two_clips():
    with pytest.raises(ValueError, match="at least two clips of a video, got 1"):
        nearest_clip_distance(torch.zeros(1, 3, 4))


def test_the_interval_of_two_errors_is_known():
    # Of two samples with squared errors 0 and 1 a quarter of the resamples has 0 twice, and a quarter 1 twice.
    found = error_estimate(torch.tensor([0.0, 1.0]))
    assert (found.low, found.high) == (0.0, 1.0) and found.value == pytest.approx(0.5**0.5)
    assert squared_errors(torch.full((2, 3), 2.0), torch.zeros(2, 3)).tolist() == [4.0, 4.0]


def test_intervals_are_those_of_samples_drawn_anew(monkeypatch):
    monkeypatch.setattr("measures.BLOCK", 4)  # ten rows in three blocks
    monkeypatch.setattr("measures.RESAMPLES", 60)
    x, y = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0)).double()
    drawn = times_drawn(10)
    assert drawn.shape == (60, 10) and (drawn.sum(dim=1) == 10).all() and torch.equal(drawn, times_drawn(10))

    def energy(rows):
        """By the definition, over pairs of different samples."""
        pairs = [(i, j) for i in rows for j in rows if i != j]
        far = [(x[i] - y[j]).norm() + (y[i] - x[j]).norm() - (x[i] - x[j]).norm() - (y[i] - y[j]).norm() for i, j in pairs]
        return sum(far) / len(far) / 3**0.5

    values = torch.stack([energy(torch.arange(10).repeat_interleave(count.long()).tolist()) for count in drawn])
    found = energy_estimate(x, y)
    assert found.value == pytest.approx(energy_distance(x, y), abs=1e-6)  # float32
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
