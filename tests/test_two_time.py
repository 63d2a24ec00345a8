"""Students that are told where their step ends: what the network is told in training and sampling, and from which windows."""

import pytest
import torch
from networks import batch, tiny_network
from test_store import CAPTIONS, FIXED, TOLD, write

from opensora_perflow import PeRFlow
from opensora_perflow.hosts.chains import CHAIN
from opensora_perflow.hosts.scale_input import direction, told
from opensora_perflow.hosts.v1.stored_chains import chain_bytes
from opensora_perflow.training import segments
from opensora_perflow.training.state import StudentState
from opensora_perflow.training.store import ChainStore
from opensora_perflow.worlds.text import TinyTextEncoder

DRAWS = dict(grids=[1, 2], two_time=True)


def lengths_told(network, call):
    """What `call` tells the network of its steps: (timesteps, lengths) of every evaluation, [B] each."""
    seen, toward = [], direction(256, 1)
    toward = toward / toward.square().sum()
    times = network.register_forward_pre_hook(lambda module, args: seen.append([args[1] / 1000]))
    plain = network.t_embedder.register_forward_pre_hook(lambda module, args: seen[-1].append(args[0]))
    moved = []
    network.t_embedder.mlp.register_forward_pre_hook(lambda module, args: moved.append(args[0].double() @ toward))
    with told(network, step=torch.zeros(1)):  # the teller's hook comes before what is to see its work
        pass
    hooks = network.t_embedder.mlp._forward_pre_hooks
    hooks.move_to_end(next(iter(hooks)))
    call()
    times.remove(), plain.remove()
    return [(t.double(), length) for (t, *_), length in zip(seen, moved)]


def test_a_step_of_no_length_is_the_network_as_it_was():
    network = tiny_network()
    x, args = batch(network)
    t = torch.tensor([900.0, 100.0])
    plain = network(x, t, **args)
    with told(network, step=torch.zeros(2)):
        assert torch.equal(network(x, t, **args), plain)
    with told(network, step=torch.tensor([0.0, 0.5])):
        other = network(x, t, **args)
    assert torch.equal(other[0], plain[0]) and not torch.allclose(other[1], plain[1])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampling_tells_each_step_its_length(steps):
    network = tiny_network().eval()
    length, size = network.y_embedder.y_embedding.shape
    scheduler = PeRFlow(**FIXED, draws=DRAWS, num_sampling_steps=steps, sampling_grid="uniform")
    z, text = torch.randn(2, 4, 5, 4, 4), TinyTextEncoder(length, size)
    text.null = network.y_embedder.y_embedding.new_zeros
    sizes = {name: torch.full((2,), float(value)) for name, value in TOLD.items()}
    call = lambda: scheduler.sample(network, text, z, CAPTIONS, additional_args=sizes, progress=False)  # noqa: E731
    found = lengths_told(network, call)
    assert len(found) == steps
    for k, (t, told_length) in enumerate(found):
        assert torch.allclose(t, torch.full((2,), 1 - k / steps, dtype=torch.float64), atol=1e-3)
        # Features of a timestep are float32 and have a small part in this direction, see scale_input.py.
        assert torch.allclose(told_length, torch.full((2,), 1 / steps, dtype=torch.float64), atol=2e-3)


def test_training_tells_the_way_to_the_end_of_the_window(tmp_path):
    """Of stored chains, whose windows are those of all grids."""
    network = tiny_network()
    _, _, args = write(tmp_path, network, windows=4)
    scheduler = PeRFlow(**FIXED, draws=dict(seed=3, **DRAWS), teacher=dict(stored=str(tmp_path)))
    chains = {CHAIN: torch.stack([chain_bytes(0), chain_bytes(1)]).bfloat16()}
    found = lengths_told(
        network, lambda: [scheduler.training_losses(network, torch.zeros(2, 4, 5, 4, 4), {**args, **chains}) for _ in range(8)]
    )
    widths = {1.0, 0.5, 0.25}
    assert len(found) == 16  # two times a solution
    for t, length in found[::2]:  # the first time of two is at the edge
        assert all(min(abs(value - width) for width in widths) < 2e-3 for value in length.tolist())
        assert all(min(abs((t_ - value) / 0.25 - k) for k in range(4)) < 2e-2 for t_, value in zip(t.tolist(), length.tolist()))
    assert len({round(value, 1) for _, length in found[::2] for value in length.tolist()}) > 1


def test_segments_of_all_grids_are_the_store_s(tmp_path, monkeypatch):
    network = tiny_network()
    _, _, args = write(tmp_path, network, windows=4)
    of, found = segments.Stored.of, []
    monkeypatch.setattr(segments.Stored, "of", lambda self, batch: found.append(of(self, batch)) or found[-1])
    scheduler = PeRFlow(**FIXED, draws=dict(seed=3, **DRAWS), teacher=dict(stored=str(tmp_path)))
    chains = {CHAIN: torch.stack([chain_bytes(0), chain_bytes(1)]).bfloat16()}
    for _ in range(8):
        scheduler.training_losses(network, torch.zeros(2, 4, 5, 4, 4), {**args, **chains})
    store = ChainStore(tmp_path)
    path = torch.stack([store.states(torch.tensor([0, 1]), torch.tensor([place] * 2)) for place in range(5)])
    lengths = set()
    for segment in found:
        for row, (start, end) in enumerate(zip(segment.t_start.tolist(), segment.t_end.tolist())):
            lengths.add(round(start - end, 6))
            assert torch.equal(segment.x_start[row], path[round(4 - 4 * start), row])
            assert torch.equal(segment.x_end[row], path[round(4 - 4 * end), row])
    assert lengths == {1.0, 0.5, 0.25}


def test_a_trained_student_is_sampled_as_it_was_told(tmp_path):
    network = tiny_network()
    trained = PeRFlow(**FIXED, draws=DRAWS)
    trained.process_of(network)
    (tmp_path / "perflow.json").write_text(trained.state().to_json())
    sampler = PeRFlow(num_sampling_steps=2)
    sampler.take_from(str(tmp_path), network)
    assert sampler.settings.two_time and sampler.grid == (1.0, 0.5, 0.0)
    assert StudentState.from_json((tmp_path / "perflow.json").read_text(), "it").draws["two_time"] is True


def test_what_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(ValueError, match="draws.grids names none"):
        PeRFlow(draws=dict(two_time=True))
    network = tiny_network()
    _, _, args = write(tmp_path, network, windows=4)
    scheduler = PeRFlow(**FIXED, draws=dict(grids=[3], two_time=True), teacher=dict(stored=str(tmp_path)))
    chains = {CHAIN: torch.stack([chain_bytes(0), chain_bytes(1)]).bfloat16()}
    with pytest.raises(ValueError, match="set windows and draws.grids to edges of the store"):
        scheduler.training_losses(network, torch.zeros(2, 4, 5, 4, 4), {**args, **chains})
