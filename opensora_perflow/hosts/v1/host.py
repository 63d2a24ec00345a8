"""Open-Sora 1.x as the host of a training run: `training.host.Host`, answered by what its scripts know."""

from pathlib import Path

from torch import nn

from opensora_perflow.hosts import masters, saving, script
from opensora_perflow.hosts.host import OpenSoraScript
from opensora_perflow.hosts.v1.lora import lora_of
from opensora_perflow.hosts.v1.weights import read_weights
from opensora_perflow.hosts.wrappers import settle, unwrap


class OpenSora(OpenSoraScript):
    """A script of Open-Sora 1.0 to 1.3."""

    first_weights = staticmethod(script.base_weights)
    weights = staticmethod(read_weights)
    resumed = staticmethod(saving.resumed_checkpoint)

    def own_teacher(self, model: nn.Module, source: str | None) -> nn.Module | None:
        network = unwrap(model)
        return None if lora_of(network) is None else network

    def restore(self, model: nn.Module) -> str:
        folder, _ = self.resumed()
        return masters.restore_masters(Path(folder), model)

    def settled(self, model: nn.Module) -> nn.Module:
        settle(model)
        return unwrap(model)
