"""`opensora_perflow.run`, with what training draws written down; see test_resume.py.

    python _recording_run.py OUT SCRIPT [args ...]

OUT/draws-RANK.pt holds each step's windows, times, noise and loss; OUT/teacher.safetensors the teacher's weights.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.run import main
from opensora_perflow.training.adapters import base_state
from opensora_perflow.training.run import TrainingRun

out, arguments = Path(sys.argv[1]), sys.argv[2:]
steps: list[dict[str, torch.Tensor]] = []
runs: list[TrainingRun] = []
solve, learn = TrainingRun.solve, TrainingRun.learn


def recorded_solve(self, batch, *args):
    runs[:] = [self]
    drawn = batch.drawn
    edges = drawn.solver_times[[0, -1]]
    steps.append({"windows": drawn.window_idx, "times": drawn.times, "edges": edges, "noise": batch.noise})
    return solve(self, batch, *args)


def recorded_learn(self, *args):
    loss = learn(self, *args)
    steps[-1]["loss"] = loss.detach().clone()
    return loss


TrainingRun.solve, TrainingRun.learn = recorded_solve, recorded_learn
main(arguments)
out.mkdir(parents=True, exist_ok=True)
rank = os.environ.get("RANK", "0")
torch.save(steps, out / f"draws-{rank}.pt")
if rank == "0":
    write_state_dict(out / "teacher.safetensors", base_state(runs[0].teacher.network))
