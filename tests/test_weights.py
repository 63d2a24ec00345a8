"""What Open-Sora's own loaders make of a file. tests/host/test_published_weights.py asks the real ones."""

import pytest
import torch
from networks import batch, tiny_network
from torch import nn

from opensora_perflow import PeRFlow
from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.hosts.v1 import weights
from opensora_perflow.hosts.v1.host import OpenSora
from opensora_perflow.hosts.v1.weights import TABLES, ZERO_AT_FIRST, as_loaded, read_weights
from opensora_perflow.training.teacher import load_teacher
from opensora_perflow.worlds.model import TinySTDiT
from opensora_perflow.worlds.model import load_teacher as shipped_teacher


def with_tables(network: nn.Module, side: int) -> nn.Module:
    """As Open-Sora 1.0's STDiT, which computes its position tables from the video's size."""
    network.register_buffer("pos_embed", torch.full((1, side * side, 32), 1.0 / side))
    network.register_buffer("pos_embed_temporal", torch.full((1, 5, 32), 0.5))
    return network


def with_references(network: nn.Module) -> nn.Module:
    """As Open-Sora 1.3's STDiT3, whose embedders of reference frames start at zero and are trained later."""
    for name in ("x_embedder_cond", "x_embedder_cond_mask"):
        embedder = nn.Module()
        embedder.proj = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        network.add_module(name, embedder)
    return network


def teach(network: nn.Module, path: object) -> nn.Module:
    """The teacher of a run's first step, by way of the scheduler."""
    scheduler = PeRFlow(teacher=dict(from_pretrained=str(path)), watch=None)
    x, args = batch(network)
    assert scheduler.training_losses(network.train(), x, args)["loss"].isfinite().all()
    return scheduler.run.teacher.network


@pytest.mark.parametrize("size", [None, 8])
def test_published_weights_of_1_0_have_no_tables_and_others_have_another_sizes(tmp_path, size):
    """A teacher from them is the network that the host loaded: with the tables of its own size."""
    state = tiny_network(5).state_dict() if size is None else with_tables(tiny_network(5), size).state_dict()
    torch.save(state, tmp_path / "published.pth")
    student = with_tables(tiny_network(), 4)
    teacher = teach(student, tmp_path / "published.pth").state_dict()
    assert all(torch.equal(teacher[name], student.state_dict()[name]) for name in TABLES)
    assert all(torch.equal(teacher[name], value) for name, value in tiny_network(5).state_dict().items())


def test_a_learned_table_must_be_in_the_file(tmp_path):
    student = tiny_network()
    student.pos_embed = nn.Parameter(torch.ones(1, 16, 32))
    torch.save(tiny_network(5).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="pos_embed is missing"):
        load_teacher(student, tmp_path / "model.pt", read_weights)
    torch.save({**tiny_network(5).state_dict(), "pos_embed": torch.zeros(1, 16, 32)}, tmp_path / "model.pt")
    assert load_teacher(student, tmp_path / "model.pt", read_weights).pos_embed.sum() == 0


def test_weights_of_1_2_in_a_network_of_1_3_have_embedders_that_are_zero(tmp_path):
    """Zero, whatever the student has: one that is resumed has trained them."""
    torch.save(tiny_network(5).state_dict(), tmp_path / "v1_2.pt")
    student = with_references(tiny_network())
    teacher = teach(student, tmp_path / "v1_2.pt").state_dict()
    assert all(torch.equal(teacher[name], torch.zeros_like(student.state_dict()[name])) for name in ZERO_AT_FIRST)
    torch.save({**tiny_network(5).state_dict(), ZERO_AT_FIRST[0]: torch.ones(32, 4, 1, 2, 2)}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="x_embedder_cond.proj.bias is missing"):  # some of them is a damaged file
        load_teacher(student, tmp_path / "part.pt", read_weights)


def test_nothing_else_may_be_missing(tmp_path):
    state = tiny_network(5).state_dict()
    del state["final_layer.linear.bias"]
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="do not fit the student: final_layer.linear.bias is missing"):
        teach(tiny_network(), tmp_path / "model.pt")


def test_frequencies_are_the_files_where_it_has_some(tmp_path):
    student, state = tiny_network(), tiny_network(5).state_dict()
    assert torch.equal(as_loaded({**state, "rope.freqs": torch.ones(8)}, student)["rope.freqs"], torch.ones(8))
    del state["rope.freqs"]
    assert torch.equal(as_loaded(state, student)["rope.freqs"], student.rope.freqs)


@pytest.mark.parametrize("length", [4, 10, 12])
def test_the_null_text_takes_the_text_encoders_length(length):
    student, state = tiny_network(), tiny_network(5).state_dict()
    null = torch.randn(length, 32)
    fitted = as_loaded({**state, "y_embedder.y_embedding": null}, student)["y_embedder.y_embedding"]
    assert torch.equal(fitted, null[[min(row, length - 1) for row in range(10)]])


def test_weights_for_4_channels_become_those_for_16_where_the_config_says_so(tmp_path, monkeypatch):
    """As upstream's: the same prediction for each of four copies of the channels."""
    small, large = tiny_network(5), tiny_network(in_channels=16)
    torch.save(small.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="x_embedder.proj.weight is"):
        load_teacher(large, tmp_path / "model.pt", OpenSora().weights)
    monkeypatch.setattr(weights, "model_settings", lambda: {"adapt_16ch": True})
    teacher = load_teacher(large, tmp_path / "model.pt", OpenSora().weights)
    x, arguments = batch(small)
    arguments = {"timestep": torch.full((2,), 500.0), **arguments}
    with torch.no_grad():
        expected, out = small(x, **arguments), teacher(x.repeat(1, 4, 1, 1, 1), **arguments)
    torch.testing.assert_close(out[:, :16], expected[:, :4].repeat(1, 4, 1, 1, 1), rtol=1e-4, atol=1e-5)  # float32


def test_the_teacher_that_ships_has_a_name():
    teacher = load_teacher(TinySTDiT(), "perflow_tiny_teacher", OpenSora().weights)
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in shipped_teacher().state_dict().items())


def test_the_hosts_names_of_published_weights(tmp_path, monkeypatch):
    """v1.1's from_pretrained="OpenSora-v1-HQ-16x512x512.pth" is fetched into pretrained_models/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained_models").mkdir()
    torch.save(tiny_network(5).state_dict(), tmp_path / "pretrained_models" / "OpenSora.pth")
    assert read_weights("OpenSora.pth", tiny_network()).keys() == read_state_dict("pretrained_models/OpenSora.pth").keys()
    with pytest.raises(ValueError, match="no checkpoint at 'other.pth'"):
        read_weights("other.pth", tiny_network())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net."])
def test_weights_of_wrapped_networks_are_taken_or_told(tmp_path, prefix):
    state = tiny_network(5).state_dict()
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "t.pt")
    if prefix == "net.":
        with pytest.raises(ValueError, match="net.rope.freqs is not in the student"):
            teach(tiny_network(), tmp_path / "t.pt")
    else:
        assert torch.equal(teach(tiny_network(), tmp_path / "t.pt").rope.freqs, state["rope.freqs"])
