import pytest
import torch
from networks import tiny_network
from torch import nn

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.training.teacher import copy_frozen, load_teacher


class Subclass(nn.Parameter):
    """Stands for colossalai's ColoParameter: its type spreads to results and copies keep it."""


def test_copy_is_plain_frozen_and_independent():
    network = tiny_network().train()
    network.x_embedder.proj.weight = Subclass(network.x_embedder.proj.weight.data)
    for module in network.modules():
        module.grad_checkpointing = True
    network.register_buffer("leafless", nn.Parameter(torch.ones(2)) * 2)  # deepcopy refuses tensors with a history
    trainable = [p.requires_grad for p in network.parameters()]
    teacher = copy_frozen(network)
    assert all(type(p) is nn.Parameter and not p.requires_grad for p in teacher.parameters())
    assert not any(m.training or m.grad_checkpointing for m in teacher.modules())
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert network.training and [p.requires_grad for p in network.parameters()] == trainable  # the student is as it was


def test_shared_parameters_stay_shared():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    teacher = copy_frozen(network)
    assert teacher[1].weight is teacher[0].weight


def test_named_weights_are_loaded_in_the_students_precision(tmp_path):
    source, student = tiny_network(1), tiny_network(2).to(torch.bfloat16)
    write_state_dict(tmp_path / "teacher.safetensors", source.state_dict())
    teacher = load_teacher(student, tmp_path / "teacher.safetensors")
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, source.state_dict()[key].to(value.dtype))


def test_a_teacher_of_another_shape_is_refused_with_the_mismatches(tmp_path):
    write_state_dict(tmp_path / "wide.safetensors", tiny_network(hidden_size=64).state_dict())
    with pytest.raises(ValueError, match=r"do not fit the student: .* is \[64.*the student's is \[32.*and \d+ more"):
        load_teacher(tiny_network(), tmp_path / "wide.safetensors")
    deep = {f"{key}.extra": value for key, value in tiny_network().state_dict().items()}
    write_state_dict(tmp_path / "other.safetensors", deep)
    with pytest.raises(ValueError, match="is missing"):
        load_teacher(tiny_network(), tmp_path / "other.safetensors")


def test_a_missing_teacher_is_refused():
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_teacher(tiny_network(), "/nowhere/teacher.pt")
