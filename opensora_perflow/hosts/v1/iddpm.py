"""What only epsilon networks need: which process a network was trained on, what iddpm guides, and the learned variance."""

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.v1.network import Interface
from opensora_perflow.hosts.v1.stdit import halves

ADVICE = (
    'write path="ddpm" for a network that iddpm trained (and iddpm or dpm-solver samples), or path="linear" for one that '
    "rflow trained"
)


def offered_processes() -> tuple[str, ...]:
    """Processes that the installed Open-Sora has schedulers for; empty where none is installed."""
    if find_spec("opensora") is None:
        return ()
    try:
        has_rflow = find_spec("opensora.schedulers.rf") is not None
    except ImportError:  # Open-Sora 2.0: no schedulers; or a host that cannot be imported here
        return ()
    return ("linear", "ddpm") if has_rflow else ("ddpm",)


def find_process(named: str, network: nn.Module | None = None) -> str | None:
    """The process, "linear" or "ddpm"; None while only the network could tell.

    First the config decides, by `path` or its keys (see keys.path_of_keys). Then the host, where it offers one process: 1.0 and
    1.1 have no rflow. Without a host the process is linear. Where the host offers both (1.2, 1.3) the network decides: STDiT3
    was only ever trained as a rectified flow. The others (STDiT, PixArt) come with configs for both.

    Raises:
        ValueError: the network is one of the others.
    """
    if named != "auto":
        return named
    offered = offered_processes()
    if len(offered) < 2:
        return offered[0] if offered else "linear"
    if network is None:
        return None
    declared = Interface.of(network).parameters
    if "fps" in declared and "ar" not in declared:  # STDiT3's forward, and no other's
        return "linear"
    raise ValueError(
        f"cannot tell whether {type(network).__name__} was trained as a diffusion or as a rectified flow: this Open-Sora has "
        f"both, and the scheduler's keys belong to both; {ADVICE}"
    )


def guided_channels(cfg_channel: int | str | None) -> int | None:
    """How many channels text guidance acts on; None: all.

    "auto" is the host's own choice. v1.0 guides the first 3 of 4 (opensora/schedulers/iddpm/__init__.py, forward_with_cfg).
    Later ones guide all, unless their config says cfg_channel.
    """
    if cfg_channel != "auto":
        return cfg_channel
    try:  # not registry.SCHEDULERS: through opensora_perflow.run the package is imported before the host can be
        from opensora.registry import SCHEDULERS as host_schedulers
    except ImportError:
        return None
    iddpm = host_schedulers.get("iddpm")
    return 3 if iddpm is not None and "cfg_channel" not in inspect.signature(iddpm).parameters else None


class VarianceMatch:
    """A student's call that also compares its variance half with the teacher's, for the same input.

    Both halves share the network's trunk. Without a loss of its own the variance would drift, and iddpm could no longer sample
    the student. Costs one evaluation of the teacher for each of the student that is trained.
    """

    def __init__(self, call: Callable[..., Tensor], teacher: Callable[..., Tensor]) -> None:
        self._call, self._teacher = call, teacher
        self._errors: list[Tensor] = []

    def __call__(self, x: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        output = self._call(x, timestep, **inputs)
        _, variance = halves(output, x.shape[1])
        if variance is not None and variance.requires_grad:  # an objective's evaluations without gradient teach nothing
            with torch.no_grad():
                _, kept = halves(self._teacher(x, timestep, **inputs), x.shape[1])
            self._errors.append((variance - kept).square())
        return output

    def take_error(self) -> Tensor | None:
        """Squared error, [B, C, T, H, W], averaged over the calls since the last one; None if there is no variance half."""
        errors, self._errors = self._errors, []
        return torch.stack(errors).mean(dim=0) if errors else None
