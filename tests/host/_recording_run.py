"""`opensora_perflow.run`, with what training draws written down; see test_resume.py.

    python _recording_run.py OUT SCRIPT [args ...]

OUT/draws.pt holds each step's windows, times and noise; OUT/teacher.safetensors the teacher's weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.v1.scheduler import PeRFlow
from opensora_perflow.method.process import DDPMPath, LinearPath
from opensora_perflow.run import main

out, arguments = Path(sys.argv[1]), sys.argv[2:]
steps: list[dict[str, torch.Tensor]] = []
schedulers: list[PeRFlow] = []
draw_windows = PeRFlow._draw_windows


def recorded_windows(self, *args, **options):
    schedulers[:] = [self]
    windows = draw_windows(self, *args, **options)
    steps.append({"windows": windows.window_idx, "times": windows.drawn.times, "edges": windows.solver_times[[0, -1]]})
    return windows


def recording_noise(add_noise):
    def recorded(self, data, noise, t):
        steps[-1].setdefault("noise", noise)
        return add_noise(self, data, noise, t)

    return recorded


PeRFlow._draw_windows = recorded_windows
for path in (LinearPath, DDPMPath):
    path.add_noise = recording_noise(path.add_noise)
main(arguments)
out.mkdir(parents=True, exist_ok=True)
torch.save(steps, out / "draws.pt")
write_state_dict(out / "teacher.safetensors", schedulers[0]._teacher.state_dict())
