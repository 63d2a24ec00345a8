"""Float32 masters are kept beside a checkpoint, and put back only where they belong to the weights that were loaded."""

from types import SimpleNamespace

import pytest
import torch
from mmengine import Config
from torch import nn

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.masters import FOLDER, restore_masters
from opensora_perflow.hosts.saving import before_each_save

FILE = "rank-0-of-1.safetensors"


class Zero:
    """As ColossalAI's ZeRO optimizer in one process: flat masters, by the ids of the parameters."""

    def __init__(self, network):
        self.masters = {id(value): value.detach().float().flatten().clone() for value in network.parameters()}

    def get_working_to_master_map(self):
        return self.masters


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2).bfloat16()


def in_script(call, optimizer, booster=None):
    """`call` as from main() of a train.py."""

    def main():
        cfg = Config(dict(scheduler=dict(type="perflow")))
        return call(), cfg, optimizer, booster

    return main()[0]


@pytest.fixture
def saved(tmp_path):
    """A network, its masters, which it holds rounded, and the folder that its checkpoint was saved to."""
    student = network()
    zero, booster = Zero(student), SimpleNamespace(save_model=lambda model, folder: None)
    for value in student.parameters():
        zero.masters[id(value)] += 1e-4 * torch.rand(value.numel())
        value.data = zero.masters[id(value)].to(torch.bfloat16).view_as(value)
    in_script(lambda: before_each_save(lambda folder: None), zero, booster)
    in_script(lambda: booster.save_model(student, str(tmp_path / "model")), zero)
    return student, list(zero.masters.values()), tmp_path


def test_masters_survive_a_checkpoint_to_the_last_bit(saved):
    student, masters, folder = saved
    resumed = Zero(student)
    assert not torch.equal(resumed.masters[id(student.weight)], masters[0])  # its loader knows the network alone
    assert in_script(lambda: restore_masters(folder, student), resumed) == "its float32 masters"
    assert all(map(torch.equal, resumed.masters.values(), masters))


def misplaced(folder):
    (folder / FOLDER / FILE).rename(folder / FOLDER / "rank-0-of-2.safetensors")


def missing(folder):
    (folder / FOLDER / FILE).unlink()


def cut(folder):
    path = folder / FOLDER / FILE
    path.write_bytes(path.read_bytes()[:-3])


def foreign(folder):
    write_state_dict(folder / FOLDER / FILE, {"weight": torch.zeros(6)})


def older(folder):
    write_state_dict(folder / FOLDER / FILE, {"weight": torch.zeros(6), "bias": torch.zeros(2)})


@pytest.mark.parametrize(
    "damage, words",
    [
        (misplaced, "holds shards of 2 processes, and this run has 1"),
        (missing, "rank-0-of-1.safetensors is missing"),
        (cut, "rank-0-of-1.safetensors' cannot be read"),
        (foreign, "is of another network"),
        (older, "does not belong to the checkpoint's weights: weight does not round to them"),
    ],
)
def test_masters_that_do_not_fit_are_left_out_and_told(damage, words, saved):
    student, _, folder = saved
    damage(folder)
    resumed = Zero(student)
    rounded = [value.clone() for value in resumed.masters.values()]
    said = in_script(lambda: restore_masters(folder, student), resumed)
    assert said.startswith("the checkpoint's rounded weights, because") and words in said
    assert all(map(torch.equal, resumed.masters.values(), rounded))


@pytest.mark.parametrize("optimizer", [None, SimpleNamespace(), SimpleNamespace(get_working_to_master_map=lambda: None)])
def test_an_optimizer_without_masters_goes_on_with_the_weights(optimizer, tmp_path):
    assert in_script(lambda: restore_masters(tmp_path, network()), optimizer) == "the checkpoint's weights"
