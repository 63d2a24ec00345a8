"""`perflow_lora` without a host: one network that is student and teacher, its copies, its checkpoints, and merging."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from mmengine.registry import Registry
from networks import PLAIN, batch, tiny_network
from torch import nn

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.checkpoints import read_state_dict, write_state_dict
from opensora_perflow.hosts.v1.host import OpenSora
from opensora_perflow.hosts.v1.lora import LoRA, add_adapters, check_config, lora_of, perflow_lora, record_of
from opensora_perflow.tools.cli import main
from opensora_perflow.tools.merge import merge
from opensora_perflow.training.adapters import adapter_state, base_state, teacher_call
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.state import StudentState, find_state, write_state
from opensora_perflow.training.teacher import copy_frozen, fingerprint

TIMES = torch.tensor([900.0, 100.0])
STATE = StudentState(windows=(1.0, 0.5, 0.0), transform=None, path="linear", prediction="velocity", guidance={"mode": "fixed"})


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def network(peft):
    return add_adapters(tiny_network().train(), LoRA(rank=4))


def moved(network, value=0.3):
    """The network after a training, so to speak."""
    with torch.no_grad():
        for name, weight in adapter_state(network).items():
            if "lora_B" in name:
                weight.fill_(value)
    return network


def scheduler(**settings):
    config = dict(type="perflow", watch=None, guidance=dict(mode="fixed", scale=2.0), **PLAIN)
    return build_module({**config, **settings}, SCHEDULERS)


def test_adapters_of_all_linear_layers_are_trained_alone(network):
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    linear = {name for name, module in tiny_network().named_modules() if isinstance(module, nn.Linear)}
    assert {name.split(".lora_")[0] for name in trained} == linear and "t_block.1" in linear
    assert trained == set(adapter_state(network)) and len(trained) == 2 * len(linear)
    assert base_state(network).keys() == tiny_network().state_dict().keys()
    assert fingerprint(network) == fingerprint(tiny_network())
    assert type(network) is type(tiny_network())


def test_the_teacher_is_the_network_without_adapters_to_the_last_bit_before_and_after_training(network):
    """A prompt's dropout, which is on in train mode, would change every answer."""
    network.y_embedder.uncond_prob = 1.0
    student, base = scheduler(), tiny_network()
    x, args = batch(base)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = student.training_losses(network, x, dict(args))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert student.run.teacher.network is network
        with torch.no_grad():
            answer = teacher_call(student.run.teacher.network, network)(x, TIMES, **args)
            assert torch.equal(answer, base(x, TIMES, **args))
        assert all(module.training for module in network.modules())
    network.y_embedder.uncond_prob = 0.0
    with torch.no_grad():
        assert not torch.allclose(network(x, TIMES, **args), answer, atol=1e-3)
    assert student.run.teacher.fingerprint == fingerprint(base) == fingerprint(network)
    assert student.state().adapters == record_of(network) and student.state().adapters["rank"] == 4


@pytest.mark.parametrize("path", ["linear", "ddpm"])
def test_a_step_is_that_of_a_student_with_a_copied_teacher(network, path):
    """Same draws, same loss, same gradients as where the teacher is another network; with ddpm also of the variance."""
    other = deepcopy_whole(network)
    del other.perflow_lora  # so that its teacher is a copy
    x, args = batch(network)
    found = []
    for model in (network, other):
        torch.manual_seed(3)
        run = scheduler(draws=dict(seed=0), path=path)
        run.training_losses(model, x, dict(args))["loss"].mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert (run.run.teacher.network is model) == (model is network)
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def deepcopy_whole(network):
    own = vars(network).pop("__deepcopy__")
    try:
        return deepcopy(network)
    finally:
        network.__deepcopy__ = own


@pytest.mark.parametrize("where", ["part", "forward", "in place"])
def test_a_compiled_student_has_an_uncompiled_teacher(network, where):
    x, args = batch(network)
    moved(network)
    calls = []

    def backend(graph, inputs):
        def run(*values):
            calls.append(len(values))
            return graph.forward(*values)

        return run

    block = network.spatial_blocks[0]
    if where == "part":
        network.spatial_blocks[0] = torch.compile(block, backend=backend)
    elif where == "forward":
        block.forward = torch.compile(block.forward, backend=backend)
    else:
        block.compile(backend=backend)
    with torch.no_grad():
        student = network.eval()(x, TIMES, **args)
        assert calls
        count = len(calls)
        answer = teacher_call(network, network)(x, TIMES, **args)
        assert len(calls) == count and torch.equal(answer, tiny_network()(x, TIMES, **args))
        torch.testing.assert_close(network(x, TIMES, **args), student, rtol=0, atol=0)
        assert len(calls) > count


def test_an_ema_copy_holds_adapters_alone_under_their_names(network):
    """What train.py does with it: opensora/utils/train_utils.py, update_ema, and ckpt_utils.py, model_sharding and save."""
    ema = deepcopy(moved(network)).to(torch.float64)
    names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in ema.named_parameters()} == names == set(ema.state_dict()) == set(network.state_dict())
    assert sum(p.numel() for p in ema.parameters()) == sum(p.numel() for p in network.parameters() if p.requires_grad)
    for parameter in ema.parameters():
        parameter.data = parameter.data.view(-1)[:1]  # sharding
    assert all(weight.dim() == 2 for weight in adapter_state(network).values())


def test_the_teacher_of_a_later_stage_shares_the_base(network):
    copy = copy_frozen(moved(network), share_untrained=True)
    own = {p.data_ptr() for p in network.parameters()}
    assert {name for name, p in copy.named_parameters() if p.data_ptr() not in own} == set(adapter_state(network))
    x, args = batch(network)
    with torch.no_grad():
        before = copy(x, TIMES, **args)
        assert torch.equal(before, network.eval()(x, TIMES, **args))
        moved(network, 0.7)
        assert torch.equal(copy(x, TIMES, **args), before)


def checkpoint(folder, network, state=STATE):
    """As Open-Sora's save writes it, with the record that a run adds."""
    write_state_dict(folder / "model" / "model.safetensors", network.state_dict())
    torch.save({name: value.float() for name, value in network.state_dict().items()}, folder / "ema.pt")
    write_state(folder, replace(state, adapters=record_of(network)))
    return folder


def test_a_checkpoint_of_adapters_loads_into_the_same_network(network, tmp_path):
    state = read_state_dict(checkpoint(tmp_path / "c", moved(network)))
    again = add_adapters(tiny_network(), LoRA(rank=4))
    again.load_state_dict(state)  # strict
    x, args = batch(network)
    with torch.no_grad():
        assert torch.equal(again(x, TIMES, **args), network.eval()(x, TIMES, **args))


def test_other_weights_than_the_adapters_are_refused_and_change_nothing(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for other, message in {
        tiny_network(3): "holds a whole network, or other adapters than this",
        add_adapters(tiny_network(), LoRA(rank=2)): r"other adapters than this network's \(TinySTDiT with LoRA\(rank=4",
    }.items():
        with pytest.raises(ValueError, match=message):
            network.load_state_dict(moved(other).state_dict() if lora_of(other) else other.state_dict(), strict=False)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_merged_weights_are_the_adapted_network(network, tmp_path):
    """float32: sums in another order, of 64 terms of size 1."""
    write_state_dict(tmp_path / "base.safetensors", tiny_network().state_dict())
    folder = checkpoint(tmp_path / "c", moved(network))
    assert main(["merge", str(folder), str(tmp_path / "out"), "--base", str(tmp_path / "base.safetensors")]) == 0
    whole = tiny_network(9)
    whole.load_state_dict(read_state_dict(tmp_path / "out"))
    x, args = batch(network)
    with torch.no_grad():
        torch.testing.assert_close(whole(x, TIMES, **args), network.eval()(x, TIMES, **args), rtol=1e-4, atol=1e-4)
    for where in (tmp_path / "out", tmp_path / "out" / "model" / "model.safetensors"):
        assert find_state(where)[0] == STATE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "c", "out"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_that_training_rounded_is_recognised(network, tmp_path, dtype):
    write_state_dict(tmp_path / "base.safetensors", tiny_network().state_dict())
    merge(checkpoint(tmp_path / "c", network.to(dtype)), tmp_path / "out", str(tmp_path / "base.safetensors"))


@pytest.mark.parametrize("fault", ["other base", "smaller base", "whole checkpoint", "no record", "out exists", "truncated"])
def test_merging_what_does_not_belong_together_writes_nothing(network, tmp_path, fault, capsys):
    base = tiny_network(5 if fault == "other base" else 0, hidden_size=16 if fault == "smaller base" else 32)
    write_state_dict(tmp_path / "base.safetensors", base.state_dict())
    folder = checkpoint(tmp_path / "c", moved(network))
    if fault == "whole checkpoint":
        write_state_dict(folder / "model" / "model.safetensors", base.state_dict())
        torch.save(base.state_dict(), folder / "ema.pt")
    if fault == "no record":
        (folder / "perflow.json").unlink()
    if fault == "truncated":
        file = folder / "model" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    if fault == "out exists":
        (tmp_path / "out").mkdir()
    assert main(["merge", str(folder), str(tmp_path / "out"), "--base", str(tmp_path / "base.safetensors")]) == 2
    expected = {
        "other base": "trained on another base than", "smaller base": "the adapters belong to another network",
        "whole checkpoint": "no checkpoint of adapters", "no record": "no checkpoint of adapters",
        "out exists": "exists; name a file or folder", "truncated": "damaged or incomplete",
    }  # fmt: skip
    said = capsys.readouterr().err
    assert expected[fault] in said and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "c"] + ["out"] * (fault == "out exists")


@pytest.fixture
def models(peft, monkeypatch):
    """A host's MODELS with the tiny network, which reads weights as hosts/tiny.py does."""
    import sys
    from types import ModuleType

    registry, package, module = Registry("model"), ModuleType("opensora"), ModuleType("opensora.registry")
    module.MODELS = registry
    monkeypatch.setitem(sys.modules, "opensora", package)
    monkeypatch.setitem(sys.modules, "opensora.registry", module)

    @registry.register_module("tiny")
    def tiny(from_pretrained, **settings):
        network = tiny_network(7, **settings)
        network.load_state_dict(OpenSora().weights(from_pretrained, network))
        return network

    return registry


@pytest.fixture
def weights(tmp_path):
    write_state_dict(tmp_path / "base.safetensors", tiny_network().state_dict())
    return str(tmp_path / "base.safetensors")


def test_the_factory_hands_what_is_not_its_own_to_the_base(models, weights):
    base = dict(type="tiny", from_pretrained="nowhere", model_max_length=7, depth=2)
    network = perflow_lora(base, from_pretrained=weights, depth=1, model_max_length=10, rank=2)
    assert lora_of(network) == LoRA(rank=2, alpha=2, targets=None) and fingerprint(network) == fingerprint(tiny_network())


def test_adapters_are_loaded_onto_the_base_as_they_were_trained(models, weights, tmp_path):
    trained = moved(add_adapters(tiny_network(), LoRA(rank=4, alpha=8, targets=["attn.qkv"])))
    folder = checkpoint(tmp_path / "c", trained)
    base = dict(type="tiny", from_pretrained=weights)
    network = perflow_lora(base, from_pretrained=str(folder))
    assert lora_of(network) == lora_of(trained)
    x, args = batch(network)
    with torch.no_grad():
        assert torch.equal(network(x, TIMES, **args), trained(x, TIMES, **args))
    for wrong, message in {
        "rank": (dict(rank=2), "the adapters were trained as LoRA.rank=4.*leave out what differs"),
        "base": (dict(base=dict(type="tiny")), "adapters need a base with weights"),
    }.values():
        with pytest.raises(ValueError, match=message):
            perflow_lora(**{"base": base, "from_pretrained": str(folder), **wrong})
    write_state_dict(weights, tiny_network(5).state_dict())
    with pytest.raises(ValueError, match="trained on another base than"):
        perflow_lora(base, from_pretrained=str(folder))
    with pytest.raises(ValueError, match="holds adapters .LoRA. alone.*opensora-perflow merge"):
        OpenSora().weights(folder, tiny_network())


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rank=0), "model.rank must be an integer >= 1, got 0"),
        (dict(alpha=0), "model.alpha must be > 0"),
        (
            dict(targets=["attn.qvk"]),
            "model.targets names 'attn.qvk', and no linear layer of TinySTDiT.*spatial_blocks.attn.qkv",
        ),
        (dict(targets=[]), "no linear layers to adapt"),
        (dict(lora_alpha=8), "unknown key lora_alpha .* did you mean alpha"),
        (dict(base=None), "model.base must be the config of a network"),
        (dict(from_pretrained=None), "adapters need a base with weights"),
    ],
)
def test_wrong_settings_are_one_sentence(models, weights, settings, message):
    with pytest.raises(ValueError, match=message):
        perflow_lora(**{"base": dict(type="tiny"), "from_pretrained": weights, **settings})


def test_without_peft_the_message_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        add_adapters(tiny_network(), LoRA())


def test_recipes_that_adapters_cannot_follow_are_refused(network, weights):
    x, args = batch(network)
    with pytest.raises(ValueError, match="teacher.from_pretrained=.* exclude each other"):
        scheduler(teacher=dict(from_pretrained=weights)).training_losses(network, x, dict(args))
    told = scheduler(guidance=dict(mode="range", scale=[1.0, 4.0]))
    blocks = add_adapters(tiny_network().train(), LoRA(rank=2, targets=["attn.qkv"]))
    with pytest.raises(ValueError, match="learned by t_embedder.mlp.0, which has no adapter; name it in model.targets"):
        told.training_losses(blocks, x, dict(args))
    network.grad_checkpointing = True
    with pytest.raises(ValueError, match="Open-Sora 1.0 and 1.1 cannot train .* with grad_checkpoint=True"):
        scheduler().training_losses(network, x, torch.tensor([100, 900]), dict(args))
    able = add_adapters(tiny_network().train(), LoRA(rank=2, targets=["attn.qkv", "t_embedder.mlp.0"]))
    loss = scheduler(guidance=dict(mode="range", scale=[1.0, 4.0])).training_losses(able, x, dict(args))["loss"]
    loss.mean().backward()
    assert able.t_embedder.mlp[0].lora_B.default.weight.grad.abs().max() > 0


def test_a_config_is_looked_at_before_anything_is_built(network, weights, tmp_path):
    model = dict(type="perflow_lora", base=dict(type="tiny", from_pretrained=weights))
    folder, whole = checkpoint(tmp_path / "c", network), tmp_path / "whole"
    write_state(whole, STATE)
    recipe = Recipe()
    assert check_config(dict(model=dict(model, from_pretrained=str(folder))), recipe)
    assert check_config(dict(model=model, load=str(folder)), recipe)
    assert not check_config(dict(model=dict(type="tiny"), load=str(whole)), recipe)
    for config, message in [
        (
            dict(model=dict(type="tiny"), load=str(folder)),
            "--load .* holds adapters .LoRA. alone, and the config's model is a whole",
        ),
        (dict(model=dict(type="tiny", from_pretrained=str(folder))), "--ckpt-path .* holds adapters"),
        (dict(model=model, load=str(whole)), "--load .* holds a whole network, and the config's model has adapters"),
        (dict(model=dict(model, rank=0)), "model.rank"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_config(config, recipe)
