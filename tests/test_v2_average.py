"""The average that Open-Sora 2.0's train.py makes, and that of adapters, in one process; two are in tests/host."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from opensora_perflow.hosts import optimizer
from opensora_perflow.hosts.v2.averages import AdapterAverage, copy_in_float32, saved_name, whole, write_average
from opensora_perflow.hosts.v2.host import OpenSora2
from opensora_perflow.training.teacher import copy_frozen


def test_the_copy_for_the_average_is_float32_and_the_next_one_is_not():
    network = nn.Linear(2, 2).bfloat16()
    copy_in_float32(network)
    assert copy_frozen(network).weight.dtype == torch.bfloat16  # a teacher is as the student
    average = deepcopy(network)
    assert average.weight.dtype == torch.float32 and not average.weight.requires_grad
    assert torch.equal(average.weight, network.weight.float()) and network.weight.requires_grad
    assert deepcopy(network).weight.dtype == torch.bfloat16


def test_an_average_moves_where_bfloat16_would_stay():
    """1 moved by .01 to 1.0078125, the next number of bfloat16: .000078, far below half a step of .0039."""
    network = nn.Linear(1, 1).bfloat16()
    nn.init.ones_(network.weight)
    copy_in_float32(network)
    average = deepcopy(network)
    average.weight.mul_(0.99).add_(torch.full((1, 1), 1.0078125), alpha=0.01)  # as update_ema does
    assert average.weight.item() == pytest.approx(1.000078125, abs=1e-7)


def test_a_whole_is_cut_and_shaped():
    shards = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}
    state = whole(shards, {"a": torch.Size([2, 3]), "b": torch.Size([2, 2])}, str.upper)
    assert torch.equal(state["A"], torch.arange(6.0).view(2, 3)) and torch.equal(state["B"], torch.ones(2, 2))


@pytest.mark.parametrize(
    "name, saved",
    [
        ("blocks.0.lora_A.default.weight", "base_model.model.blocks.0.lora_A.weight"),
        ("guidance_in.modules_to_save.default.in_layer.bias", "base_model.model.guidance_in.in_layer.bias"),
    ],
)
def test_names_are_those_of_pefts_files(name, saved):
    assert saved_name(name) == saved


class Adapted(nn.Module):
    """A layer with an adapter under peft's name."""

    def __init__(self):
        super().__init__()
        self.base = nn.Parameter(torch.ones(1), requires_grad=False)
        self.lora_B = nn.ModuleDict({"default": nn.Linear(1, 1, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)


def test_adapters_are_averaged_after_each_step_and_go_on_from_a_checkpoint(tmp_path):
    network = Adapted()
    weight = network.lora_B["default"].weight

    def step():
        weight.data += 8.0
        return "stepped"

    optimizer = SimpleNamespace(step=step)
    average = AdapterAverage(network, optimizer, 0.5, tmp_path)  # no ema.safetensors there
    assert optimizer.step() == "stepped" and optimizer.step() == "stepped"
    name = "base_model.model.lora_B.weight"
    assert {key: value.item() for key, value in average.whole().items()} == {name: 10.0}  # (0 + 8) / 2, then (4 + 16) / 2
    write_average(tmp_path, average)
    assert load_file(tmp_path / "ema.safetensors")[name].item() == 10.0
    again = AdapterAverage(network, SimpleNamespace(step=step), 0.5, tmp_path)
    assert again.whole()[name].item() == 10.0 and weight.item() == 16.0


def test_a_rollback_puts_the_average_of_adapters_back(monkeypatch):
    """Else one step's NaN would stay in the average for good, which is what is exported."""
    network, host = Adapted(), OpenSora2()
    weight = network.lora_B["default"].weight
    script = SimpleNamespace(step=lambda: weight.data.fill_(float("nan")))
    host.followed = AdapterAverage(network, script, 0.5, None)
    monkeypatch.setattr(optimizer, "main_variable", {"model": network, "optimizer": script}.get)
    put_back = host.keep_state()
    script.step()
    (average,) = host.followed.ema.averages.values()
    assert average.isnan().all() and put_back() is None
    assert average.item() == weight.item() == 0.0


def test_a_script_without_an_average_gets_no_file(tmp_path):
    write_average(tmp_path, None)
    assert list(tmp_path.iterdir()) == []
