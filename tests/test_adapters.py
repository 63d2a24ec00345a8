"""LoRA in a network, and the network without it, to the last bit: as peft does it, and as peft itself where it is installed."""

from __future__ import annotations

import pytest
import torch
from mmdit import TinyMMDiT, arguments, compare, note_nulls
from torch import nn

from opensora_perflow.hosts.v2.flux import PeRFlowFlux
from opensora_perflow.training.adapters import adapters, adapters_off, base_state, remove_adapters
from opensora_perflow.training.teacher import fingerprint, load_teacher


class Lora(nn.Module):
    """A linear layer as peft wraps it."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self._disable_adapters = layer, False
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})

    def forward(self, x):
        added = 0 if self._disable_adapters else self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + added


class Saved(nn.Module):
    """A module of modules_to_save."""

    def __init__(self, original):
        super().__init__()
        self.original_module, self._disable_adapters = original, False
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(original.in_features, original.out_features)})

    def forward(self, x):
        return (self.original_module if self._disable_adapters else self.modules_to_save["default"])(x)


def by_hand(network):
    network.requires_grad_(False)
    network.out, network.cond_in = Lora(network.out), Saved(network.cond_in)
    return network


def by_peft(network):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["out"], modules_to_save=["cond_in"])
    model = peft.get_peft_model(network, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.3)
    return network


@pytest.fixture(params=[by_hand, by_peft])
def adapt(request):
    return request.param


def test_the_network_without_its_adapters(adapt):
    network, given = TinyMMDiT(), arguments()[0]
    before, plain = fingerprint(network), network(**given)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    assert not adapters(network) and base_state(network).keys() == state.keys()
    adapt(network)
    assert len(adapters(network)) == 2 and fingerprint(network) == before
    found = base_state(network)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    trained = [parameter.requires_grad for parameter in network.parameters()]
    assert not torch.equal(network(**given), plain)
    with adapters_off(network):
        assert torch.equal(network(**given), plain)
        with adapters_off(network):
            pass
        assert torch.equal(network(**given), plain)  # an inner use switches nothing on
    assert not torch.equal(network(**given), plain)
    assert trained == [parameter.requires_grad for parameter in network.parameters()]


def test_adapters_come_back_after_an_error(adapt):
    network, given = adapt(TinyMMDiT()), arguments()[0]
    with_them = network(**given)
    with pytest.raises(RuntimeError), adapters_off(network):
        raise RuntimeError
    assert torch.equal(network(**given), with_them)


def test_removed_adapters_leave_the_network(adapt):
    network, given = TinyMMDiT(), arguments()[0]
    plain, names = network(**given), list(network.state_dict())
    adapt(network)
    remove_adapters(network)
    assert list(network.state_dict()) == names and torch.equal(network(**given), plain)


def test_a_teacher_from_a_file_has_no_adapters(adapt, tmp_path):
    from opensora_perflow.checkpoints import write_state_dict

    other, given = TinyMMDiT(seed=7), arguments()[0]
    write_state_dict(tmp_path / "other.safetensors", other.state_dict())
    teacher = load_teacher(adapt(TinyMMDiT()), tmp_path / "other.safetensors")
    assert not adapters(teacher) and torch.equal(teacher(**given), other(**given))


def test_a_student_with_adapters_is_taught_by_itself_without(adapt, monkeypatch):
    """One network in memory; one Euler step at the edge is what its own base says, so that the loss is the adapters' part."""
    note_nulls(monkeypatch)
    network = TinyMMDiT()
    hooks = PeRFlowFlux(dict(windows=1, teacher=dict(steps_per_window=1, solver="euler"), draws=dict(edge_mass=1.0)))
    adapt(hooks.attach(network)).train()
    given, target = arguments()
    seen = []
    network.register_forward_pre_hook(lambda *_: seen.append(hooks._step))
    loss = compare(network(**given), target)
    assert hooks.run.teacher.network is network
    (_, batch, segment) = seen[0]
    told = {name: value for name, value in given.items() if name not in ("img", "timesteps")}
    from mmdit import LAYOUT

    img, t = LAYOUT.pack(batch.noise), torch.ones(2)
    student = TinyMMDiT.forward(network, img=img, timesteps=t, **told)
    with adapters_off(network):
        teacher = TinyMMDiT.forward(network, img=img, timesteps=t, **told)
    torch.testing.assert_close(loss, (student - teacher).square().mean(), rtol=1e-3, atol=1e-9)
    loss.backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)
