"""Open-Sora 1.x as the host of a training run: `training.host.Host`, answered by what its scripts know."""

from pathlib import Path

from torch import nn

from opensora_perflow.hosts import masters, parallel, saving, script
from opensora_perflow.hosts.v1.lora import lora_of
from opensora_perflow.hosts.v1.weights import read_weights
from opensora_perflow.hosts.wrappers import settle, unwrap


class OpenSora:
    """The Open-Sora script that is calling; where none is, the process stands alone."""

    seed = staticmethod(script.host_seed)
    first_weights = staticmethod(script.base_weights)
    weights = staticmethod(read_weights)
    resumed = staticmethod(saving.resumed_checkpoint)
    trained_students = staticmethod(script.trained_students)
    before_each_save = staticmethod(saving.before_each_save)
    rank = staticmethod(parallel.data_parallel_rank)
    mean = staticmethod(parallel.mean_over_ranks)
    gathered = staticmethod(parallel.gathered)
    shared = staticmethod(parallel.shared)

    def own_teacher(self, model: nn.Module, source: str | None) -> nn.Module | None:
        network = unwrap(model)
        return None if lora_of(network) is None else network

    def restore(self, model: nn.Module) -> str:
        folder, _ = self.resumed()
        return masters.restore_masters(Path(folder), model)

    def settled(self, model: nn.Module) -> nn.Module:
        settle(model)
        return unwrap(model)
