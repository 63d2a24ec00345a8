"""The random numbers of training: a function of the seed, the data-parallel rank and the step's number, and of nothing else.

Nothing is carried from one step to the next, so a resumed run needs the step's number and no generator's state. Processes that
work on the same samples (sequence parallelism) draw the same without a word between them. The process's global
generator is neither read nor moved.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch


def step_generator(
    seed: int, rank: int, step: int, *, device: torch.device | str = "cpu", purpose: str = "training"
) -> torch.Generator:
    """The generator of one step. Its numbers depend on the arguments alone (and on the device's kind, cpu or cuda).

    Args:
        seed: Any integer.
        rank: Data-parallel rank, >= 0: which share of the samples this process works on.
        step: >= 0.
        device: Where the numbers are drawn.
        purpose: Separates streams that count their steps independently.
    """
    # torch's CPU generator keeps 32 bits of its seed: hashing the step as well would let steps of a long run collide.
    return torch.Generator(device).manual_seed((_stream(purpose, seed, rank) + step) % 2**63)


@lru_cache
def _stream(purpose: str, seed: int, rank: int) -> int:
    stream = hashlib.sha256(f"opensora_perflow {purpose} {seed} {rank}".encode()).digest()
    return int.from_bytes(stream[:7], "big")


@dataclass
class TrainingRandomness:
    """Counts a run's training steps and gives each its generator.

    seed, rank: see `step_generator`. steps: training steps so far. evaluations: loss evaluations so far, a stream of their own
    that moves no training step.
    """

    seed: int
    rank: int
    steps: int = 0
    evaluations: int = 0

    def next_generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """The generator of the step that begins now: a training step where gradients are enabled, else an evaluation."""
        if torch.is_grad_enabled():
            step, self.steps = self.steps, self.steps + 1
            return step_generator(self.seed, self.rank, step, device=device)
        step, self.evaluations = self.evaluations, self.evaluations + 1
        return step_generator(self.seed, self.rank, step, device=device, purpose="evaluation")
