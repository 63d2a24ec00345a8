"""Networks in wrappers: whatever is around a network, it is called through, and read from inside."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from networks import PROMPTS, Reference13, batch, sizes, text_encoder, tiny_network
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from opensora_perflow import PeRFlow
from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.scale_input import direction, told
from opensora_perflow.hosts.v1.host import OpenSora
from opensora_perflow.hosts.v1.network import Interface
from opensora_perflow.hosts.v1.stdit import without_text_dropout
from opensora_perflow.hosts.wrappers import settle, unwrap
from opensora_perflow.training.teacher import copy_frozen, load_teacher

TIMES = torch.tensor([900.0, 100.0])
RANGE = dict(mode="range", scale=(1.0, 9.0))


class Booster(nn.Module):
    """colossalai's ModelWrapper, and what LowLevelZeroModel adds to it for us."""

    def __init__(self, module):
        super().__init__()
        self.module, self.waited = module, 0

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def _force_wait_all_gather(self):
        self.waited += 1


def compiled(network):
    return torch.compile(network, backend="eager")


def adapted(network):
    peft = pytest.importorskip("peft")
    # The text's projection stands for the layers that are adapted; B = 0 at first, so that nothing is changed.
    layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and "y_embedder" in name]
    return peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=layers or ["x_embedder_cond"]))


WRAPPERS = {
    "compile": compiled,
    "booster": Booster,
    "ddp": DistributedDataParallel,
    "booster of compile": lambda network: Booster(compiled(network)),
    "booster of peft": lambda network: Booster(adapted(network)),
}


@pytest.fixture(scope="module", autouse=True)
def alone_in_a_group(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group') / 'file'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    torch.compiler.reset()
    yield WRAPPERS[request.param]
    torch.compiler.reset()


def sampled(model, encoder, scale=None, **config):
    latents = torch.randn(2, 4, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = PeRFlow(windows=2, num_sampling_steps=2, **config)
    with torch.no_grad():
        return scheduler.sample(
            model, encoder, latents, PROMPTS, additional_args=sizes(2), guidance_scale=scale, progress=False
        )


@contextmanager
def counted_compilations():
    """How many graphs are compiled within, by torch._dynamo's own count."""
    counters, count = torch._dynamo.utils.counters, [0]
    before = counters["stats"]["unique_graphs"]
    yield count
    count[0] = counters["stats"]["unique_graphs"] - before


def test_the_network_is_found(wrap):
    network = tiny_network()
    model = wrap(network)
    assert unwrap(model) is network and unwrap(network) is network


def test_parts_named_like_a_wrappers_are_none():
    network = tiny_network()
    network.module = "a name"  # not a network
    assert unwrap(network) is network


def test_the_network_is_read_from_inside(wrap):
    model = wrap(tiny_network().train())
    interface = Interface.of(model)
    assert interface.network is unwrap(model) and interface.embedder is unwrap(model).y_embedder
    assert "fps" in interface.parameters and not {"args", "ar"} & set(interface.parameters)
    assert interface.text_dropout == pytest.approx(0.1)
    unwrap(model).y_embedder.uncond_prob = 0.4
    assert Interface.of(model).text_dropout == pytest.approx(0.4) and Interface.of(model.eval()).text_dropout == 0.0


class WithoutSizes(nn.Module):
    """The call of Open-Sora 1.0's STDiT: no sizes, no **kwargs."""

    def __init__(self):
        super().__init__()
        self.gain, self.y_embedder = nn.Parameter(torch.ones(())), tiny_network().y_embedder

    def forward(self, x, timestep, y, mask=None):
        return self.gain * x + y.mean()


def test_a_network_without_fps_gets_none(wrap):
    network = WithoutSizes()
    encoder, model = text_encoder(network), wrap(network)
    assert Interface.of(model).accepted(sizes(2)) == {}
    assert sampled(model, encoder, path="linear").isfinite().all()


def test_weights_are_complete_before_they_are_read(wrap):
    model = wrap(tiny_network())
    boosters = [layer for layer in model.modules() if isinstance(layer, Booster)]
    settle(model)
    assert [booster.waited for booster in boosters] == [1] * len(boosters)


# --- the scale ---


def test_a_wrapped_student_is_told_its_scale(wrap):
    network = tiny_network()
    encoder, model = text_encoder(network), wrap(network)
    sampled(model, encoder, cfg_scale=1.0)  # compiled code that knows of no scale
    wide = [sampled(model, encoder, scale, guidance=RANGE) for scale in (1.0, 9.0)]
    bare = [sampled(network, encoder, scale, guidance=RANGE) for scale in (1.0, 9.0)]
    torch.testing.assert_close(wide, bare, rtol=1e-5, atol=1e-6)  # "eager" runs the same kernels
    assert (wide[0] - wide[1]).abs().max() > 1e-2
    assert set(unwrap(model).state_dict()) == set(network.state_dict())


def test_a_new_scale_compiles_nothing():
    torch.compiler.reset()
    network = tiny_network()
    x, args = batch(network)
    model = compiled(network)
    with torch.no_grad():
        with told(network, torch.ones(2)):
            model(x, TIMES, **args)
        with counted_compilations() as count:
            for scale in (1.5, 3.0, 9.0):
                with told(network, torch.full((2,), scale)):
                    model(x, TIMES, **args)
            model(x, TIMES, **args)
    assert count == [0]


def test_no_key_of_the_state_is_new(wrap):
    network = tiny_network()
    keys = list(network.state_dict())
    model = wrap(deepcopy(network))
    bare = list(model.state_dict())
    with told(model, torch.ones(2)):
        assert list(model.state_dict()) == bare
    assert list(model.state_dict()) == bare and list(network.state_dict()) == keys


def test_a_compiled_student_learns_what_the_scale_means():
    network = tiny_network().train()
    x, args = batch(network)
    PeRFlow(guidance=RANGE, watch=None).training_losses(compiled(network), x, args)["loss"].mean().backward()
    assert (network.t_embedder.mlp[0].weight.grad @ direction(256).float()).abs().max() > 0


# --- the text ---


def test_a_wrapped_student_drops_no_text_of_its_own(wrap):
    network = tiny_network(class_dropout_prob=1.0).train()
    x, args = batch(network)
    expected = without_text_dropout(network, Interface.of(network))(x, TIMES, **args)
    model = wrap(deepcopy(network)).train()
    assert not torch.allclose(model(x, TIMES, **args), expected)  # compiled code that drops text
    torch.testing.assert_close(
        without_text_dropout(model, Interface.of(model))(x, TIMES, **args), expected, rtol=1e-4, atol=1e-5
    )
    assert unwrap(model).y_embedder.uncond_prob == 1.0


def test_a_compiled_text_embedder_drops_no_text():
    network = tiny_network(class_dropout_prob=1.0).train()
    x, args = batch(network)
    expected = without_text_dropout(network, Interface.of(network))(x, TIMES, **args)
    network.y_embedder = compiled(network.y_embedder)
    assert Interface.of(network).text_dropout == 1.0
    torch.testing.assert_close(without_text_dropout(network, Interface.of(network))(x, TIMES, **args), expected)


# --- references ---


def test_references_are_accepted(wrap):
    network = Reference13().train()
    x, args = batch(network)
    model = wrap(network)
    PeRFlow(watch=None).training_losses(model, x, args, mask_index=[0])["loss"].mean().backward()
    assert network.seen[-1]["mask_index"] == [0] and network.seen[-1]["text_uncond_prob"] == 0.0


# --- the teacher ---


def test_a_named_teacher_is_accepted(wrap, tmp_path):
    source, network = tiny_network(5), tiny_network().train()
    write_state_dict(tmp_path / "teacher.safetensors", source.state_dict())
    x, args = batch(network)
    scheduler = PeRFlow(teacher=dict(from_pretrained=str(tmp_path / "teacher.safetensors")), watch=None)
    loss = scheduler.training_losses(wrap(network), x, args)["loss"]
    assert loss.isfinite().all() and loss.min() > 0
    teacher = scheduler.run.teacher.network
    assert type(teacher) is type(source)
    torch.testing.assert_close(teacher.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_the_copy_is_the_network_uncompiled(wrap):
    network = tiny_network()
    x, args = batch(network)
    teacher = copy_frozen(OpenSora().settled(wrap(network)))
    assert type(teacher) is type(network) and teacher is not network
    with counted_compilations() as count, torch.no_grad():
        torch.testing.assert_close(teacher(x, TIMES, **args), network(x, TIMES, **args))
    assert count == [0]


def test_compiled_parts_are_copied_uncompiled(tmp_path):
    source, network = tiny_network(5), tiny_network()
    write_state_dict(tmp_path / "teacher.safetensors", source.state_dict())
    network.spatial_blocks[0] = compiled(network.spatial_blocks[0])
    network.t_embedder.mlp = compiled(network.t_embedder.mlp)
    teacher = load_teacher(network, tmp_path / "teacher.safetensors")
    assert list(teacher.state_dict()) == list(source.state_dict())
    assert list(load_teacher(compiled(network), None).state_dict()) == list(source.state_dict())
    x, args = batch(source)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x, TIMES, **args), source(x, TIMES, **args), rtol=0, atol=0)


@pytest.mark.parametrize("compile_it", [nn.Module.compile, lambda n: setattr(n, "forward", compiled(n.forward))])
def test_a_network_compiled_in_place_is_copied_uncompiled(compile_it):
    network = tiny_network()
    x, args = batch(network)
    compile_it(network)
    assert "fps" in Interface.of(network).parameters and "args" not in Interface.of(network).parameters
    with torch.no_grad():
        before = network(x, TIMES, **args)
        teacher = copy_frozen(network)
        for parameter in network.parameters():
            parameter.zero_()
        with counted_compilations() as count:
            torch.testing.assert_close(teacher(x, TIMES, **args), before)
    assert count == [0]


def test_adapters_of_a_student_do_not_reach_a_named_teacher(tmp_path):
    source, network = tiny_network(5), tiny_network()
    write_state_dict(tmp_path / "teacher.safetensors", source.state_dict())
    model = adapted(network)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    x, args = batch(source)
    teacher, copy = load_teacher(unwrap(model), tmp_path / "teacher.safetensors"), load_teacher(unwrap(model), None)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x, TIMES, **args), source(x, TIMES, **args), rtol=0, atol=0)
        torch.testing.assert_close(copy(x, TIMES, **args), model(x, TIMES, **args))
