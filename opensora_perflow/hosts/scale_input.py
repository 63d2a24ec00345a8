r"""Further inputs of an Open-Sora network, added to the features of its timestep before their MLP: the guidance scale, and the
length of its step.

Every STDiT, and 2.0's MMDiT, embeds its timestep as cosines and sines (256 channels) and sends them through an MLP
(`t_embedder.mlp`, `time_in`), whose result modulates every block. The scale w and the length t - s of a step from t to s
enter there as

    features(timestep) + (w - 1) / UNIT direction_0 + (t - s) direction_1

and the first layer of the MLP, which is trained, learns what they mean. No parameter is added, so the optimizer, the EMA and
the checkpoints of the host know nothing of it. At w = 1 and s = t the network is what it was.

A hook before the MLP adds them. The hook is never compiled, so that a compiled network, too, is told each value, and no value
compiles anything anew. It is put into a network when a first value is told, and stays.

The directions alternate in sign over the slowest quarter of the sines, the first at every sine, the second at every other.
Both are 0 at the ends of that quarter. From one slow sine to the next the features of a timestep hardly change. For every
timestep their product with a direction is below 3e-5 and 2e-4 of both norms (256 channels). No timestep uses these directions:
the layer can learn there without unlearning the time. Its first weights there mean nothing. Sines, because those are small
there: bfloat16 rounds a sum with cosines near 1 to 1/128.

Source: the scale as an input of a student is Meng et al. (arXiv:2210.03142), section 3.1, and LCM (arXiv:2310.04378), section
4.2, which embed it with new layers; the end of a step is that of flow maps, as in MeanFlow (arXiv:2505.13447). The directions
are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.wrappers import compiler_is_loaded, forget_compiled, unwrap

UNIT = 8.0
"""Change of the scale that moves the features by one `direction`."""


def direction(channels: int, which: int = 0) -> Tensor:
    """A direction in the features of a timestep, [channels], float64, with entries in [-1, 1]; `which`: 0 says the scale, 1 the
    length of a step.

    The features are channels // 2 cosines and as many sines of timestep * 10000^(-k / (channels // 2)), k rising, as in all of
    Open-Sora's networks.
    """
    count = channels // 2 // 4
    k = torch.arange(count, dtype=torch.float64)
    result = torch.zeros(channels, dtype=torch.float64)
    result[channels - count :] = (1 - 2 * ((k // 2**which) % 2)) * torch.sin(math.pi * (k + 0.5) / count) ** 2
    return result


@contextmanager
def told(network: nn.Module, scale: Tensor | None = None, step: Tensor | None = None) -> Iterator[None]:
    """Within, calls of the network, and of wrappers around it, are told guidance scales [B] of their rows, and lengths of their
    steps [B] in flow time.

    Raises:
        ValueError: the network has no MLP of its timestep.
    """
    teller = _teller(unwrap(network))
    before, teller.moved = teller.moved, _moved(scale, step)
    try:
        yield
    finally:
        teller.moved = before


def tell(network: nn.Module, step: Tensor | None) -> None:
    """Have calls of the network told lengths of their steps [B], or none, until told otherwise; errors as `told`."""
    _teller(unwrap(network)).moved = _moved(None, step)


def _moved(scale: Tensor | None, step: Tensor | None) -> dict[int, Tensor]:
    moved = {} if scale is None else {0: (scale.double() - 1.0) / UNIT}
    return moved if step is None else {**moved, 1: step.double()}


class _Teller:
    """A pre-hook of the MLP of a network's timestep, which adds `moved`: number of a direction -> how many of them [B].

    A copy of the network gets a teller of its own, which tells nothing.
    """

    def __init__(self) -> None:
        self.moved: dict[int, Tensor] = {}
        self.compilable = not compiler_is_loaded()
        self._add = _add if self.compilable else torch.compiler.disable(_add)

    def __reduce__(self) -> tuple[type[_Teller], tuple[()]]:
        return _Teller, ()

    def __call__(self, mlp: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return self._add(self, inputs)


def _add(teller: _Teller, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if not teller.moved:
        return None
    features = inputs[0]
    for which, amount in teller.moved.items():
        moved = amount.to(features.device)[:, None] * direction(features.shape[-1], which).to(features.device)
        features = features + moved.to(features.dtype)
    return (features, *inputs[1:])


def _teller(network: nn.Module) -> _Teller:
    """The network's teller, which is put there if there is none that compiled code meets."""
    mlp = getattr(getattr(network, "t_embedder", None), "mlp", None) or getattr(network, "time_in", None)
    if mlp is None:
        raise ValueError(
            f"{type(network).__name__} cannot be told a guidance scale, or where a step ends: it has no t_embedder.mlp or "
            'time_in, where Open-Sora\'s networks embed their timestep; use guidance=dict(mode="fixed", scale=...) and '
            "draws.two_time=False"
        )
    hooks = unwrap(mlp)._forward_pre_hooks
    found = {key: hook for key, hook in hooks.items() if isinstance(hook, _Teller)}
    for key, teller in found.items():
        if not (teller.compilable and compiler_is_loaded()):
            return teller
        del hooks[key]
    teller = _Teller()
    unwrap(mlp).register_forward_pre_hook(teller)
    forget_compiled()
    return teller
