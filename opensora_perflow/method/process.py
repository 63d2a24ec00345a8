r"""The process that noises data, on which a teacher was trained: what its points are, and what a network's output means there.

A point is x_t = alpha(t) data + sigma(t) noise, with t as in conventions.py: 1 is noise, 0 is data. Here is the straight one,
alpha = 1 - t and sigma = t. It is rectified flow: the `rflow` of Open-Sora 1.2 and 1.3, and all of 2.0. ddpm.py has the other.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from opensora_perflow.conventions import interpolate
from opensora_perflow.method.solvers import hold_frames, states

Output = Callable[[Tensor, Tensor], Tensor]
"""output(x, timestep): what a network says, guided, for states x [B, ...] and told timesteps [B]; shaped like x."""

Bounds = Callable[[Tensor], "tuple[Tensor, Tensor]"]
"""bounds(t) -> (t_start, t_end): the window that each sample's time lies in; all [B], float64."""


class Process(Protocol):
    """What training and sampling need of a process, which also knows what a network is told instead of a flow time."""

    num_timesteps: int
    """Size of the network's timestep range."""

    predictions: tuple[str, ...]
    """What a student's output may stand for; the first is the default."""
    still_time: float
    """The time that training noises frozen frames to."""
    probe_time: float
    """Where noise is one and a half times as strong as data: a network without a guess at the data shows there."""

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Point of the process; data and noise [B, ...], t [B]."""

    def ideal(self, data: Tensor, noise: Tensor) -> Tensor:
        """What a network would say that saw through a point of data and noise [B, ...]."""

    def to_timestep(self, t: Tensor) -> Tensor:
        """Flow time -> the timestep that the network is told, float32."""

    def from_timestep(self, timestep: Tensor) -> Tensor:
        """The host's timestep -> flow time in [0, 1], float64."""

    def states(self, output: Output, x: Tensor, times: Tensor, *, method: str, frame_mask: Tensor | None) -> Iterator[Tensor]:
        """Carry x along times [S + 1, B] with a teacher's output, yielding the state at each. Frames [B, T] that are False in
        the mask stand still."""

    def velocity(self, output: Output, prediction: str, bounds: Bounds, x: Tensor, t: Tensor) -> Tensor:
        """What a student's output says at a state, as the velocity dx/dt of its window's straight line."""

    def output_units(self, prediction: str, bounds: Bounds) -> Callable[[Tensor], Tensor]:
        """t [B] -> factor [B] that turns an error of the velocity into one of an output that is no velocity."""


class Linear:
    """Rectified flow.

    Args:
        num_timesteps: The network is told t num_timesteps.
        sign: Of the network's output beside dx/dt = noise - data: -1 in Open-Sora 1.2 and 1.3, which answer data - noise.
    """

    predictions = ("velocity",)
    still_time = 0.0
    probe_time = 0.6

    def __init__(self, num_timesteps: int = 1000, sign: int = -1) -> None:
        self.num_timesteps, self.sign = num_timesteps, sign

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return interpolate(data, noise, t)

    def ideal(self, data: Tensor, noise: Tensor) -> Tensor:
        return self.sign * (noise - data)

    def to_timestep(self, t: Tensor) -> Tensor:
        return (t * self.num_timesteps).to(torch.float32)

    def from_timestep(self, timestep: Tensor) -> Tensor:
        return (timestep.to(torch.float64) / self.num_timesteps).clamp(0.0, 1.0)

    def states(
        self, output: Output, x: Tensor, times: Tensor, *, method: str = "euler", frame_mask: Tensor | None = None
    ) -> Iterator[Tensor]:
        field = partial(self.velocity, output, "velocity", None)
        return states(field if frame_mask is None else hold_frames(field, frame_mask), x, times, method=method)

    def velocity(self, output: Output, prediction: str, bounds: Bounds | None, x: Tensor, t: Tensor) -> Tensor:
        return self.sign * output(x, self.to_timestep(t))


def check_prediction(process: Process, prediction: str) -> str:
    """The prediction that a student makes on this process; "auto" is the process's first.

    Raises:
        ValueError: a prediction that the process's networks cannot make.
    """
    if prediction == "auto":
        return process.predictions[0]
    if prediction not in process.predictions:
        raise ValueError(
            f'prediction={prediction!r} needs an epsilon network (IDDPM), path="ddpm"; rectified-flow networks (rflow), '
            f'path="linear", output a {process.predictions[0]}: use prediction="auto"'
        )
    return prediction
