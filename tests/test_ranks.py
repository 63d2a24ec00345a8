import torch.distributed as dist
import torch.multiprocessing as mp

from opensora_perflow.hosts.v1.parallel import mean_over_ranks


def worker(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    results = [mean_over_ranks(value) for value in ((1.0, 4.0)[rank], (float("nan"), 1.0)[rank])]
    dist.destroy_process_group()
    assert results[0] == 2.5 and results[1] != results[1]  # the same on both, NaN included


def test_two_processes_agree_on_the_mean(tmp_path):
    mp.spawn(worker, (tmp_path / "rendezvous",), nprocs=2)


def test_a_plain_process_keeps_its_number():
    assert mean_over_ranks(0.3) == 0.3
