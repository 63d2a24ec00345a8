"""Stored chains and encoded texts of Open-Sora 2.0: losses equal to those of a teacher that solves now, and what is refused."""

from dataclasses import replace

import pytest
import torch
from mmdit import CHANNELS, EULER, LAYOUT, POOLED, TOKENS, WORDS, TinyMMDiT, arguments, compare, hooked, note_nulls, told

from opensora_perflow.hosts.chains import CHAIN, Part
from opensora_perflow.hosts.v2 import encoded_text, text
from opensora_perflow.hosts.v2.chain_solver import chain_solver
from opensora_perflow.hosts.v2.encoded_text import encode_captions, perflow_encoded_clip, perflow_encoded_t5
from opensora_perflow.hosts.v2.keys import read_config
from opensora_perflow.training import segments
from opensora_perflow.training.store import ChainStore, ChainWriter, chain_noise

FIXED = dict(guidance=dict(mode="fixed", scale=[4.0, 3.0, 2.0, 2.0]), draws=dict(seed=3), watch=None)
LATENT = (CHANNELS, LAYOUT.frames, LAYOUT.rows * LAYOUT.patch, LAYOUT.columns * LAYOUT.patch)
TOLD = dict(num_frames=9, height=32, width=64)


@pytest.fixture(autouse=True)
def nulls(monkeypatch):
    return note_nulls(monkeypatch)


def write(folder, dtype="float32", config=FIXED, network=None, data=None):
    """A store of two chains with the arguments of mmdit.py, over `data` or from noise; their noise [2, ...]."""
    recipe, keys = read_config(config)
    settings = dict(guidance_embed=True) if recipe.guidance.mode == "range" else {}
    network = TinyMMDiT(**settings) if network is None else network
    solver = chain_solver(recipe, keys, network, lambda captions, latent: arguments()[0], seed=5)
    solver = replace(solver, origin=replace(solver.origin, dtype=dtype))
    ((ends, *others),) = solver.solve(Part(["one", "two"], TOLD, LATENT, 2, data=data), 0)
    ChainWriter(folder, solver.origin).write(0, 0, ends, ["one", "two"], TOLD, *others)
    return torch.stack([chain_noise(5, chain, LATENT) for chain in range(2)])


def losses(network, steps=4, **more):
    given, target = arguments()
    return torch.stack([compare(network(**given, **more), target) for _ in range(steps)]).detach()


def stored_losses(folder, config=FIXED, chains=(0, 1), **settings):
    network, hooks = hooked({**config, "teacher": dict(config.get("teacher", {}), stored=str(folder))}, **settings)
    return losses(network, **{CHAIN: torch.tensor(chains)})


def online_losses(monkeypatch, noise, config=FIXED, **settings):
    """The same steps of a teacher that solves now, where windows start on its own path from the noise."""

    def on_the_path(batch, way):
        path = segments.path_times(hooks.run.solver_grids, batch.noise, batch.windows.ratio)
        states = segments.teacher_path(
            noise, path, lambda x, t, k: hooks.run.segments.edge(batch, hooks.recipe.guidance, x, t, k)
        )
        return states[batch.drawn.window_idx, torch.arange(len(noise))]

    monkeypatch.setattr(segments, "reached", on_the_path)
    network, hooks = hooked(config, **settings)
    return losses(network)


@pytest.mark.parametrize("config", [FIXED, {**FIXED, "windows": [1.0, 0.6, 0.0], "flow_shift": 3.0, "guidance": dict(
    mode="fixed", scale=3.0)}], ids=["uniform", "flow_shift"])  # fmt: skip
def test_losses_are_those_of_a_teacher_that_solves_now(tmp_path, monkeypatch, config):
    noise = write(tmp_path / "float32", config=config)
    online = online_losses(monkeypatch, noise, config)
    assert torch.equal(stored_losses(tmp_path / "float32", config), online)
    write(tmp_path / "float16", "float16", config)
    half = stored_losses(tmp_path / "float16", config)
    # States below 8 are off by 8 times float16's rounding, slopes by twice that over the window's length, .18 at least. The
    # loss is a mean square: |a^2 - b^2| <= |a - b| (2 |b| + |a - b|).
    slope = 2 * 8 * 2.0**-11 / 0.18
    assert ((half - online).abs() <= slope * (2 * online.sqrt() + slope)).all()
    assert not torch.equal(half, online)


def test_losses_over_data_are_those_of_a_teacher_that_solves_now(tmp_path, monkeypatch):
    """A teacher that solves starts at train.py's x_t with more noise; here both start at the clip with the chain's noise."""
    config = {**FIXED, "draws": dict(starts="diffused", seed=3)}
    data = torch.randn(2, *LATENT)
    noise = write(tmp_path, config=config, data=data)
    stored = stored_losses(tmp_path, config)
    real = segments.diffused
    monkeypatch.setattr(segments, "diffused", lambda batch, t: real(replace(batch, data=data, noise=noise), t))
    assert torch.equal(stored, losses(hooked(config)[0]))


def test_scales_of_mode_range_are_the_chains_own(tmp_path, monkeypatch):
    config = {**FIXED, "guidance": dict(mode="range", scale=(1.0, 5.0))}
    noise = write(tmp_path, config=config)
    scales = ChainStore(tmp_path).scales(torch.tensor([0, 1]))
    assert ((scales >= 1) & (scales <= 5)).all() and scales[0] != scales[1]
    monkeypatch.setattr("opensora_perflow.training.recipe.draw_scales", lambda *a, **k: scales)
    online = online_losses(monkeypatch, noise, config, guidance_embed=True)
    assert torch.equal(stored_losses(tmp_path, config, guidance_embed=True), online)


def test_no_teacher_is_asked(tmp_path):
    write(tmp_path)
    network, hooks = hooked({**FIXED, "teacher": dict(stored=str(tmp_path))})
    network.rows.clear()
    losses(network, steps=3, **{CHAIN: torch.tensor([0, 1])})
    assert network.rows == [4, 4, 4]  # two times a solution in one call, and nothing else


def test_the_solver_s_network_is_not_copied(tmp_path):
    network = TinyMMDiT()
    write(tmp_path, network=network)
    assert network.rows and not any(parameter.requires_grad for parameter in network.parameters())
    store = ChainStore(tmp_path)
    assert store.origin.host == {"transform": {"formula": "v2.0", "flow_shift": None}, "patch_size": LAYOUT.patch}
    assert store.origin.teacher_source == "the network as it was built (random weights)"
    assert store.chains == [(0, TOLD), (1, TOLD)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(windows=2, guidance=dict(mode="fixed", scale=3.0)), "guidance than this training has: scale is"),
        (dict(windows=3, guidance=dict(mode="fixed", scale=3.0)), "this training's windows .* have others"),
        (dict(flow_shift=3.0), r"'flow_shift': None\} there and .*'flow_shift': 3.0\} here"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(tmp_path, config, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        stored_losses(tmp_path, {**FIXED, **config})


def test_batches_and_stores_have_to_go_together(tmp_path):
    write(tmp_path)
    network, _ = hooked({**FIXED, "teacher": dict(stored=str(tmp_path))})
    with pytest.raises(ValueError, match="this batch names none; use dataset"):
        losses(network)
    with pytest.raises(ValueError, match="holds no chain 9"):
        stored_losses(tmp_path, chains=(0, 9))
    with pytest.raises(ValueError, match="names stored chains; say which: model=dict"):
        losses(hooked({**FIXED, **EULER})[0], **{CHAIN: torch.tensor([0, 1])})


def test_chains_are_found_in_the_batch_of_train_py(tmp_path):
    """Its call of the network passes none: they are what its main() has in `batch`."""
    write(tmp_path)
    expected = stored_losses(tmp_path)
    network, _ = hooked({**FIXED, "teacher": dict(stored=str(tmp_path))})

    def main():
        cfg, batch = {"model": {"type": "perflow_flux"}}, {CHAIN: torch.tensor([0, 1])}
        assert cfg and batch
        return losses(network)

    assert torch.equal(main(), expected)


def encoder(argument):
    def said(texts):
        return torch.stack([told()[argument][0] + len(one) for one in texts])

    return said


TEXTS = ["", "a red circle moving right", "a blue square"]


def encode(folder, captions=TEXTS):
    header = {"text_encoder": {"t5": "tiny"}}
    return encode_captions(folder, captions, encoder("txt"), encoder("y_vec"), header)


def test_encoders_answer_as_those_that_were_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_text, "ROWS", 2)
    assert encode(tmp_path) == 3 and encode(tmp_path) == 0
    t5 = perflow_encoded_t5(str(tmp_path), torch_dtype=torch.float32, max_length=512, shardformer=True)
    clip = perflow_encoded_clip(str(tmp_path), torch_dtype=torch.float32)
    for one, argument, shape in ((t5, "txt", (2, TOKENS, WORDS)), (clip, "y_vec", (2, POOLED))):
        found = one([TEXTS[2], TEXTS[1]])
        assert found.shape == shape and torch.equal(found, encoder(argument)([TEXTS[2], TEXTS[1]]))
        assert torch.equal(one(TEXTS[1]), encoder(argument)([TEXTS[1]])) and not list(one.parameters())
        assert one("").dtype == torch.float32  # noted as the text that guidance leads away from
        assert torch.equal(text._NULLS[argument], encoder(argument)([""]))
    assert perflow_encoded_t5(str(tmp_path))("").dtype == torch.bfloat16


def test_texts_that_were_not_encoded_are_refused(tmp_path):
    encode(tmp_path)
    t5 = perflow_encoded_t5(str(tmp_path))
    with pytest.raises(ValueError, match="'a white star' is none of the 3 captions that were encoded"):
        t5(["a white star"])
    with pytest.raises(ValueError, match="sp_size=2 does not divide 8 tokens of a video and 5 of its text, which only T5"):
        t5("", added_tokens=8, seq_align=2)
