"""What the processes of a run tell each other, in two processes of gloo."""

import pytest
from networks import batch, tiny_network
from processes import in_two_processes

from opensora_perflow import PeRFlow
from opensora_perflow.hosts.parallel import mean_over_ranks


def worker(rank):
    results = [mean_over_ranks(value) for value in ((1.0, 4.0)[rank], (float("nan"), 1.0)[rank])]
    assert results[0] == 2.5 and results[1] != results[1]  # the same on both, NaN included


def test_two_processes_agree_on_the_mean(tmp_path):
    in_two_processes(worker, tmp_path)


def test_a_plain_process_keeps_its_number():
    assert mean_over_ranks(0.3) == 0.3


def training_worker(rank, settings, message):
    network = tiny_network().train()
    x, args = batch(network)
    scheduler = PeRFlow(**settings[rank])
    if message is None:
        assert scheduler.training_losses(network, x, args)["loss"].isfinite().all()
        assert scheduler.run.shares == 2
        for _ in range(3):  # measurements wait for each other, of batches that are not alike
            scheduler.training_losses(network, *batch(network, 3 + rank))
        held = scheduler.run.monitor
        assert [len(one.start) for one in held.batches] == [2, 3 + rank, 3 + rank] and held._count == 18
    else:
        with pytest.raises(ValueError, match=message):  # in both
            scheduler.training_losses(network, x, args)


@pytest.mark.parametrize(
    "one, other, message",
    [
        (dict(draws=dict(seed=1), watch=dict(every=1)), dict(draws=dict(seed=2), watch=dict(every=1)), None),
        (dict(windows=4), dict(windows=8), r"process 1 \(here\): windows is \[1.0, 0.75, .* there and \[1.0, 0.875"),
        (dict(teacher=dict(steps_per_window=2)), dict(teacher=dict(steps_per_window=3)), '"steps_per_window": 2.* there and'),
        (dict(curriculum=dict(windows=[4, 2])), dict(curriculum=dict(windows=[4, 1])), "curriculum is"),
        (dict(cfg_scale=3.0), dict(cfg_scale=4.0), "cfg_scale is 3.0 there and 4.0 here"),
    ],
)  # fmt: skip
def test_processes_that_disagree_are_refused_at_the_first_step(one, other, message, tmp_path):
    in_two_processes(training_worker, tmp_path, (one, other), message)


def other_teacher_worker(rank):
    network = tiny_network(seed=rank).train()
    with pytest.raises(ValueError, match='teacher is "fingerprint .*" there and "fingerprint .*" here'):
        PeRFlow().training_losses(network, *batch(network))


def test_processes_with_different_teachers_are_refused(tmp_path):
    in_two_processes(other_teacher_worker, tmp_path)
