"""The optimizer of the running script: its learning rate, and copies of all that its steps change."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_perflow.hosts.script import main_variable
from opensora_perflow.hosts.wrappers import settle


def folder() -> Path | None:
    """Where the running script writes, in the first process."""
    found = main_variable("exp_dir")
    first = not dist.is_initialized() or dist.get_rank() == 0
    return Path(found) if first and isinstance(found, str) else None


def log_scalars(step: int, values: Mapping[str, float]) -> None:
    """Beside the script's own numbers in TensorBoard and wandb, as perflow/NAME; where it has neither, nothing."""
    writer = main_variable("tb_writer") or main_variable("writer")
    if hasattr(writer, "add_scalar"):
        for name, value in values.items():
            writer.add_scalar(f"perflow/{name}", value, step)
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        run.log({f"perflow/{name}": value for name, value in values.items()}, commit=False)  # the script commits


def device() -> torch.device | str:
    """Of the running script's networks."""
    return main_variable("device") or "cpu"


def ema() -> nn.Module | None:
    found = main_variable("ema")
    return found if isinstance(found, nn.Module) else None


def rate() -> float | None:
    """The learning rate of the running script's optimizer."""
    return rate_of(main_variable("optimizer"))


def scale_rate(factor: float) -> None:
    """Multiply the learning rate of the running script, and what its schedule starts from."""
    scale_rates(factor, main_variable("optimizer"), main_variable("lr_scheduler"))


def keep_state(others: Iterable[Tensor] = ()) -> Callable[[], None]:
    """Copy what steps of the running script change, and other tensors that move with it."""
    model = main_variable("model")
    settle(model)
    return kept([model, ema()], main_variable("optimizer"), others)


def rate_of(optimizer: Any) -> float | None:
    groups = getattr(optimizer, "param_groups", None)
    return float(groups[0]["lr"]) if groups else None


def scale_rates(factor: float, optimizer: Any, schedule: Any = None) -> None:
    for group in getattr(optimizer, "param_groups", ()):
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] *= factor
    while schedule is not None:  # warm-ups hold the schedule that comes after them
        if hasattr(schedule, "base_lrs"):
            schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
        schedule = getattr(schedule, "after_scheduler", None)


def kept(networks: Iterable[nn.Module | None], optimizer: Any, others: Iterable[Tensor] = ()) -> Callable[[], None]:
    """Copies, on the CPU, of networks' weights, of an optimizer's own, which ZeRO's masters are, and of other tensors. Returns
    what puts them back.

    An optimizer's state that did not exist yet is emptied.
    """
    inner = optimizer
    while hasattr(inner, "optim"):  # the boosters' wrappers
        inner = inner.optim
    groups = getattr(inner, "param_groups", ())
    trained = [parameter for group in groups for parameter in group["params"]]
    weights = [p for network in networks if network is not None for p in network.parameters()]
    copies = [(value, _copy(value)) for value in {id(p): p for p in (*weights, *trained, *others)}.values()]
    state = {p: {name: _copy(value) for name, value in inner.state.get(p, {}).items()} for p in trained}

    @torch.no_grad()
    def put_back() -> None:
        for value, copy in copies:
            _plain(value).copy_(copy)
        for parameter, values in state.items():
            inner.state.pop(parameter, None)
            if values:
                inner.state[parameter] = {
                    name: value.to(parameter.device, copy=True) if _is_moment(value) else _copy(value)
                    for name, value in values.items()
                }

    return put_back


def _plain(value: Tensor) -> Tensor:
    return value.detach().as_subclass(Tensor)


def _copy(value: Any) -> Any:
    return _plain(value).cpu().clone() if isinstance(value, Tensor) else value


def _is_moment(value: Any) -> bool:
    """Adam counts its steps in a tensor on the CPU."""
    return isinstance(value, Tensor) and value.dim() > 0
