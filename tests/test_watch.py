"""What is said of a run's held-out errors, and how sure a measurement has to be before it warns."""

import logging
import math

import pytest
import torch

from opensora_perflow.training.recipe import WatchSettings
from opensora_perflow.training.watch import ENOUGH, Estimate, Seen, Watch

WORSE, RISES = "further from its teacher than a network that was not trained", "It rises, by more than"


def seen(error, untrained=1.0, best=None, spread=0.01, count=ENOUGH, spikes=False):
    """A measurement whose differences have the standard error `spread`."""
    rise = None if best is None else Estimate(error**2 - 1.25**2 * best**2, spread)
    worse = Estimate(error**2 - 1.02**2 * untrained**2, spread)
    far = Estimate(error**2 - 1.25**2 * untrained**2, spread)
    return Seen(count, Estimate(error, spread), Estimate(untrained, spread), worse, far, rise, spikes)


@pytest.mark.parametrize(
    "errors, expected",
    [
        ([0.5, 0.4, 0.45], ["", "", ""]),  # a rise within the tolerance
        ([0.5, 0.4, 0.55, 0.6], ["", "", RISES, RISES]),
        ([1.0, 1.01, 0.9], ["", "", ""]),  # as bad as an untrained network
        ([1.2, 1.2, 0.9, 1.2], ["", WORSE, "", WORSE]),  # once may be the warm-up; after an improvement it is not
        ([0.5, math.nan, math.inf, 0.5], ["", "not finite", "not finite", ""]),
    ],
)
def test_what_is_said_of_a_measurement(errors, expected):
    watch, best = Watch(WatchSettings(every=10, tolerance=0.25)), None
    for i, (error, words) in enumerate(zip(errors, expected, strict=True)):
        level, text = watch.observe(10 * (i + 1), seen(error, best=best))
        assert level == (logging.WARNING if words else logging.INFO) and words in text
        assert text.startswith(f"PeRFlow after {10 * (i + 1)} training steps: held-out error {error:.4g} ± 0.01 on 16 samples")
        best = min(error, best or error) if math.isfinite(error) else best


def test_what_may_be_an_accident_of_the_samples_is_no_warning():
    for spread, level in ((0.01, logging.WARNING), (0.5, logging.INFO)):
        watch = Watch(WatchSettings(every=10))
        watch.observe(10, seen(0.9, spread=spread))
        assert watch.observe(20, seen(1.3, best=0.9, spread=spread))[0] == level


def test_few_samples_and_the_first_steps_do_not_warn():
    watch = Watch(WatchSettings(every=200))
    assert watch.observe(10, seen(2.0, spikes=True))[0] == logging.INFO
    level, text = watch.observe(50, seen(2.0, count=ENOUGH - 1, spikes=True))
    assert level == logging.INFO and "16 samples are needed to judge" in text
    assert watch.observe(100, seen(2.0, spikes=True))[0] == logging.WARNING


def test_the_learning_rate_is_named_where_it_is_the_likelier_cause():
    def text_of(*measurements):
        watch = Watch(WatchSettings(every=10))
        return [watch.observe(10 * (i + 1), one)[1] for i, one in enumerate(measurements)][-1]

    assert "it was better before, so the learning rate is probably too high" in text_of(seen(0.9), seen(1.2))
    assert "the losses rise, so the learning rate is probably too high" in text_of(seen(1.2, spikes=True))
    assert "training took it far from where it began, so the learning rate" in text_of(seen(1.3))
    never = text_of(seen(1.2), seen(1.2))
    assert "it was never better, and the losses do not rise" in never and "too high" not in never


def test_nothing_to_learn_is_an_error():
    with pytest.raises(ValueError, match="held-out error 0 of 0 after 10 training steps: .*nothing to learn"):
        Watch(WatchSettings(every=10)).observe(10, seen(0.0, untrained=0.0))


def test_the_first_measurements_come_early():
    watch = Watch(WatchSettings(every=200))
    assert [steps for steps in range(801) if watch.wants_measurement(steps)] == [10, 50, 100, 200, 400, 600, 800]
    watch = Watch(WatchSettings(every=3))  # a quarter of it is no step
    assert [steps for steps in range(10) if watch.wants_measurement(steps)] == [1, 3, 6, 9]


def test_an_estimate_over_two_processes_is_that_of_all_their_samples():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0, 0.5])
    whole = Estimate.of(values, lambda value: value, 5)
    parts = [values[:2], values[2:]]
    sums = iter([2.5, values.sum().item() / 2, (values - values.mean()).square().sum().item() / 2])
    over_ranks = Estimate.of(parts[0], lambda value: next(sums), 5)  # what the mean over both answers
    assert (whole.mean, whole.error) == pytest.approx((values.mean().item(), values.std().item() / 5**0.5))
    assert (over_ranks.mean, over_ranks.error) == pytest.approx((whole.mean, whole.error))
    assert whole.root().error == pytest.approx(whole.error / (2 * whole.mean**0.5))
