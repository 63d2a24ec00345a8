"""Imported by a config of test_matching_scripts.py: each process says after each step what its adapters are."""

import torch
import torch.distributed as dist

from opensora_perflow.training.fake_score import FakeScore

term = FakeScore.term


def saying(self: FakeScore, *given: object) -> torch.Tensor:
    found = term(self, *given)
    digest = sum(up.double().sum().item() + up.double().square().sum().item() for _, up in self.weights.values())
    # One write, so that lines of two processes stay whole.
    print(f"adapters of process {dist.get_rank()}: {digest!r}\n", end="", flush=True)
    return found


FakeScore.term = saying
