"""The student's one evaluation with a gradient in a step, which Open-Sora's script makes itself.

The script calls the network once and compares the answer. Where the student is to be evaluated has to be known before that
call, and the objective needs the answer: it runs twice, once to hear where it asks, once on what the network said there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_perflow.hosts.v2.network import Told, repeated
from opensora_perflow.hosts.v2.tokens import Layout
from opensora_perflow.method.process import Output


class Evaluation:
    """A student's output whose calls with a gradient become rows of one call of the network.

    Args:
        direct: The output without a gradient, evaluated when asked.
        told, layout: Of the batch.
    """

    def __init__(self, direct: Output, told: Told, layout: Layout) -> None:
        self.direct, self.told, self.layout = direct, told, layout
        self._asked: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._answers: list[Tensor] | None = None

    def __call__(self, x: Tensor, t: Tensor, step: Tensor | None = None) -> Tensor:
        rehearsing = self._answers is None
        if not torch.is_grad_enabled():
            return torch.zeros_like(x) if rehearsing else self.direct(x, t, step)
        if rehearsing:
            self._asked.append((x, t, step))
            return torch.zeros_like(x)
        asked = self._asked.pop(0) if self._asked else None
        if asked is None or not (torch.equal(asked[0], x) and torch.equal(asked[1], t)):
            raise ValueError(
                "this objective evaluates the student, with a gradient, where an earlier answer of the student leads; "
                "Open-Sora 2.0's train.py makes one evaluation a step. Use perflow, perflow_phased, perflow_direction or "
                "perflow_consistency"
            )
        return self._answers.pop(0)

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the network has to be called with, after the rehearsal: as many batches as there were calls."""
        states, times, _ = zip(*self._asked)
        rows = repeated(self.told, len(states))
        return {**rows, "img": self.layout.pack(torch.cat(states)).to(dtype), "timesteps": torch.cat(times).to(dtype)}

    @property
    def steps(self) -> Tensor | None:
        """Lengths of the rows' steps, [n B], where the network is told them."""
        steps = [step for _, _, step in self._asked]
        return None if steps[0] is None else torch.cat(steps)

    def answer(self, output: Tensor) -> None:
        """Take what the network said, [n B, L, D], with its graph."""
        self._answers = list(self.layout.unpack(output.float()).chunk(len(self._asked)))

    def close(self) -> None:
        """Let go of graph and states; only evaluations without a gradient are answered from here on."""
        self._asked, self._answers = [], []
