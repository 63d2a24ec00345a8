"""What training draws is a function of (seed, data-parallel rank, step) and of nothing else."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine import Config
from networks import Reference13, batch, tiny_network
from processes import in_two_processes

from opensora_perflow.hosts.parallel import data_parallel_rank, shared
from opensora_perflow.hosts.v1.scheduler import PeRFlow
from opensora_perflow.training.randomness import TrainingRandomness, step_generator

DRAWS = dict(starts="diffused", per_solve=2, edge_mass=0.5)
"""Every kind of draw in one config: windows, times in them, noise, text drops; Reference13 adds the reference's."""


def numbers(*args, **settings):
    return torch.rand(4, generator=step_generator(*args, **settings)).tolist()


def test_a_step_is_a_pure_function_of_seed_rank_and_step():
    assert numbers(1, 2, 3) == numbers(1, 2, 3)
    assert len({tuple(numbers(*args)) for args in ((1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (12, 3, 3))}) == 5
    assert numbers(1, 2, 3, purpose="evaluation") != numbers(1, 2, 3)


def test_steps_of_a_long_run_share_no_generator():
    """torch's CPU generator keeps 32 bits of its seed: 200 000 hashed seeds would meet about five times."""
    seeds = {step_generator(7, 1, step).initial_seed() % 2**32 for step in range(200_000)}
    assert len(seeds) == 200_000


def test_evaluations_count_no_training_step():
    one, other = TrainingRandomness(5, 0), TrainingRandomness(5, 0)
    with torch.no_grad():
        drawn = [torch.rand(2, generator=one.next_generator()) for _ in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(torch.rand(2, generator=one.next_generator()), torch.rand(2, generator=other.next_generator()))
    assert (one.steps, one.evaluations, other.steps) == (1, 2, 1)


def recorded(scheduler):
    """What each following step of the scheduler drew: its segment's start (noise and starts), times and the text it shows."""
    seen, objective = [], scheduler.objective

    def record(student, segment, t, weights):
        seen.append(torch.cat([segment.x_start.flatten(), segment.t_start, t]))
        return objective(student, segment, t, weights)

    scheduler.objective = record
    return seen


def training(steps, seed=None, cut=0, disturb=False, data_seed=2, mask_index=(0,)):
    """All that `steps` steps drew, as one tensor; the first `cut` of them are made by a scheduler of their own."""
    torch.manual_seed(1)
    network = Reference13().train()
    x, args = batch(tiny_network(seed=data_seed), 3)
    args["y"] = torch.ones_like(args["y"])  # the text encoder is not what is compared
    # watch=None: after a measurement the last thing that the network saw is not the step's.
    settings = dict(
        watch=None, draws=dict(DRAWS, seed=9 if seed is None else seed), drop_condition=dict(null=1, cond=1, text=1, keep=1)
    )
    drawn = []
    for first, last in ((0, cut), (cut, steps)):
        scheduler = PeRFlow(windows=3, teacher=dict(steps_per_window=1), **settings)
        with torch.no_grad():  # an evaluation begins the run, and moves no training step
            scheduler.training_losses(network, x, args, mask_index=list(mask_index))
        scheduler.run.randomness.steps = first
        network.seen.clear()
        seen = recorded(scheduler)
        for _ in range(first, last):
            if disturb:
                torch.rand(17)
            scheduler.training_losses(network, x, args, mask_index=list(mask_index))
            shown = network.seen[-1]  # to the student: its text and reference, after their dropout
            drawn += [*seen, shown["y"].flatten(), shown["cond"].flatten()]
            seen.clear(), network.seen.clear()
    return torch.cat([part.double() for part in drawn])


def test_twenty_steps_are_ten_and_ten_more():
    whole = training(20)
    assert torch.equal(whole, training(20, cut=10))
    assert not torch.equal(whole[: len(whole) // 2], whole[len(whole) // 2 :]) and not torch.equal(whole, training(20, seed=8))


def test_the_global_generator_is_neither_read_nor_moved():
    assert torch.equal(training(3), training(3, disturb=True))
    network = tiny_network().train()
    x, args = batch(network)
    before = torch.get_rng_state()
    PeRFlow(draws=DRAWS).training_losses(network, x, args)
    assert torch.equal(before, torch.get_rng_state())


def first_noise(scheduler, **script):
    """The window starts of a first step, called from a main() with the config `script` if there is one."""
    network = tiny_network().eval()
    x, args = batch(network)
    seen = recorded(scheduler)

    def main():
        cfg = Config(dict(scheduler=dict(type="perflow"), **script)) if script else None
        scheduler.training_losses(network, x, args)
        return cfg

    main()
    return seen[0]


def test_the_seed_is_the_configs_or_the_hosts_or_torchs():
    def drawn(torch_seed, draws=None, **script):
        torch.manual_seed(torch_seed)
        scheduler = PeRFlow(draws=draws or {})
        first_noise(scheduler, **script)
        return scheduler.run.randomness.seed

    network_seed = 0  # tiny_network seeds torch
    assert drawn(4) == network_seed
    assert drawn(4, seed=42) == 42
    assert drawn(4, draws=dict(seed=3), seed=42) == 3
    assert drawn(4, load=None) == network_seed


def test_torchs_seed_governs_where_nothing_else_is_said():
    network = tiny_network().eval()
    x, args = batch(network)

    def losses(seed):
        torch.manual_seed(seed)
        return PeRFlow().training_losses(network, x, args)["loss"]

    assert torch.equal(losses(3), losses(3)) and not torch.equal(losses(3), losses(4))


def test_steps_survive_a_repeated_init():
    scheduler = PeRFlow()
    first_noise(scheduler)
    scheduler.__init__(num_sampling_steps=8)
    assert scheduler.run.randomness.steps == 1


@pytest.mark.parametrize("seed", [1.5, "1", True])
def test_the_seed_must_be_an_integer(seed):
    with pytest.raises(ValueError, match="draws.seed must be an integer, or None for the host's, got"):
        PeRFlow(draws=dict(seed=seed))


# --- several processes ---


def test_without_torch_distributed_a_process_is_alone():
    assert data_parallel_rank() == 0 and shared(1, None) == (1, None)


def of_rank(rank):
    """Values of several kinds: a tensor that lies across memory, a bool, a scalar, and no tensors."""
    across = torch.arange(6).reshape(2, 3).bfloat16().T + rank
    return across, torch.tensor([rank == 0, True]), torch.tensor(rank), None, [rank], 0.1 * rank


def _two_processes(rank, results):
    """Rank `rank` of two: first as one sequence-parallel group, as the host keeps them, then as two data-parallel ranks."""
    alone = [dist.new_group([index]) for index in range(2)]  # ZeroSeqParallelPlugin: dp_group holds one process of each group
    sys.modules["opensora.acceleration.parallel_states"] = SimpleNamespace(
        get_data_parallel_group=lambda: alone[rank], get_sequence_parallel_group=lambda: dist.group.WORLD
    )
    together = training(3, data_seed=rank, mask_index=[rank])  # neither latents nor v1.3's reference frames agree here
    kinds = shared(*(of_rank(rank) if rank == 0 else (None, *of_rank(rank)[1:])))
    del sys.modules["opensora.acceleration.parallel_states"]
    torch.save((together, kinds, training(3)), f"{results}/{rank}.pt")


def test_a_sequence_parallel_group_draws_the_same_and_data_parallel_ranks_differ(tmp_path):
    """Two processes with gloo, whose latents and reference frames differ until they are shared: then windows, times, noise,
    starts, text and reference drops are the same. No network is split: the host's alltoall needs nccl and is not run here."""
    in_two_processes(_two_processes, tmp_path, tmp_path)
    (one, kinds, first), (other, same_kinds, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(one, other) and one.shape == first.shape == second.shape
    assert not torch.equal(first, second)
    for found in (kinds, same_kinds):
        assert all(torch.equal(a, b) for a, b in zip(found[:3], of_rank(0))) and list(found[3:]) == [None, [0], 0.0]
