"""Stored chains: losses equal to those of a teacher that solves now, and what is refused."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from networks import batch, tiny_network

from opensora_perflow import PeRFlow
from opensora_perflow.hosts.chains import CHAIN, Part, check_recipe
from opensora_perflow.hosts.storing import Workers
from opensora_perflow.hosts.v1 import storing
from opensora_perflow.hosts.v1.chain_solver import chain_solver
from opensora_perflow.hosts.v1.stored_chains import chain_bytes
from opensora_perflow.training import segments
from opensora_perflow.training.examination import Case, targets
from opensora_perflow.training.shards import text_digest
from opensora_perflow.training.store import ChainStore, ChainWriter, Origin, chain_noise
from opensora_perflow.training.teacher import fingerprint

TOLD = {"num_frames": 17, "height": 64, "width": 64, "ar": 1.0, "fps": 24}
FIXED = dict(guidance=dict(mode="fixed", scale=3.0), watch=None)
CAPTIONS = ["a red circle moving right", "a blue square"]


@pytest.fixture(scope="module")
def network():
    return tiny_network()


def write(folder, network, dtype="float32", first=0, further=0, plan=None, **config):
    """A store of two chains on the batch of networks.py; (its writer, noise [2, ...], model_args)."""
    _, args = batch(network)
    solver = chain_solver(PeRFlow(**{**FIXED, **config}), network, None, seed=5, dtype=torch.float32)

    def noise(one=0):
        return torch.stack([chain_noise(5, first + row, (4, 5, 4, 4), one) for row in range(2)])

    ends, scales = solver.ends(noise(), args, first)
    more = [solver.ends(noise(one), args, first, num_windows=1)[0] for one in range(1, further + 1)]
    writer = ChainWriter(folder, replace(solver.origin, dtype=dtype, first_window=further), **(plan or {}))
    writer.write(first // 2, first, ends, CAPTIONS, TOLD, scales, torch.cat(more, dim=1) if more else None)
    return writer, noise(), args


def stored_losses(folder, network, args, steps=4, **config):
    """Losses of some steps from the store in a folder."""
    scheduler = PeRFlow(**{**FIXED, **config}, draws=dict(seed=3), teacher=dict(stored=str(folder)))
    chains = {CHAIN: torch.stack([chain_bytes(0), chain_bytes(1)]).bfloat16()}
    x = torch.zeros(2, 4, 5, 4, 4)
    return torch.stack([scheduler.training_losses(network, x, {**args, **chains})["loss"] for _ in range(steps)]).detach()


def online_losses(monkeypatch, network, noise, args, steps=4, **config):
    """The same steps of a teacher that solves now, where windows start on its own path from the noise."""

    def on_the_path(batch, way):
        path = segments.path_times(scheduler.run.solver_grids, batch.noise, batch.windows.ratio)
        solved, guidance = scheduler.run.segments, scheduler.recipe.guidance
        states = segments.teacher_path(batch.noise, path, lambda x, t, k: solved.edge(batch, guidance, x, t, k))
        return states[batch.drawn.window_idx, torch.arange(len(batch.noise))]

    monkeypatch.setattr(segments, "reached", on_the_path)
    scheduler = PeRFlow(**{**FIXED, **config}, draws=dict(seed=3))
    x = torch.zeros_like(noise)
    return torch.stack([scheduler.training_losses(network, x, args, noise=noise)["loss"] for _ in range(steps)]).detach()


@pytest.mark.parametrize("config", [{}, dict(use_timestep_transform=True, windows=[1.0, 0.6, 0.0])])
def test_losses_are_those_of_a_teacher_that_solves_now(tmp_path, monkeypatch, network, config):
    _, noise, args = write(tmp_path / "float32", network, **config)
    online = online_losses(monkeypatch, network, noise, args, **config)
    assert torch.equal(stored_losses(tmp_path / "float32", network, args, **config), online)
    for dtype, rounding in (("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
        write(tmp_path / dtype, network, dtype, **config)
        loss = stored_losses(tmp_path / dtype, network, args, **config)
        # States below 8 are off by `rounding` times 8, and slopes by twice that over the window's length, at least a quarter.
        # The loss is a mean square: |a^2 - b^2| <= |a - b| (2 |b| + |a - b|).
        slope = 2 * 8 * rounding / 0.25
        assert ((loss - online).abs() <= slope * (2 * online.sqrt() + slope)).all() and not torch.equal(loss, online)


class Text:
    """Says of any captions what networks.batch says of its own."""

    def __init__(self, args):
        self.args = args

    def encode(self, captions):
        return {name: self.args[name] for name in ("y", "mask")}


DIFFUSED = dict(**FIXED, draws=dict(starts="diffused", seed=3))


def write_over_data(folder, network, data, dtype, **config):
    """A store of two chains over latents [2, ...]; model_args of the training."""
    _, args = batch(network)
    solver = chain_solver(PeRFlow(**{**DIFFUSED, **config}), network, Text(args), seed=5, dtype=torch.float32)
    solver = replace(solver, origin=replace(solver.origin, dtype=dtype))
    told = {**TOLD, "fps": [24.0, 12.0]}
    ((ends, scales, further, kept),) = solver.solve(Part(CAPTIONS, told, (4, 5, 4, 4), 2, data=data), 0)
    ChainWriter(folder, solver.origin).write(0, 0, ends, CAPTIONS, told, scales, further, kept)
    return {**args, "fps": torch.tensor(told["fps"])}


@pytest.mark.parametrize("config", [{}, dict(use_timestep_transform=True, windows=[1.0, 0.6, 0.0])])
def test_losses_over_data_are_those_of_a_teacher_that_solves_now(tmp_path, network, config):
    """Windows start at the clip's latents with the chain's noise. Latents are rounded to the store's dtype before the teacher
    solves, so that the bound of its ends alone holds."""
    data, chains = torch.randn(2, 4, 5, 4, 4), {CHAIN: torch.stack([chain_bytes(0), chain_bytes(1)]).bfloat16()}
    noise = torch.stack([chain_noise(5, chain, (4, 5, 4, 4)) for chain in range(2)])
    for dtype, rounding in (("float32", 0), ("float16", 2.0**-11)):
        args = write_over_data(tmp_path / dtype, network, data, dtype, **config)
        assert [told["fps"] for _, told in ChainStore(tmp_path / dtype).chains] == [24.0, 12.0]
        online = PeRFlow(**{**DIFFUSED, **config})
        stored = PeRFlow(**{**DIFFUSED, **config}, teacher=dict(stored=str(tmp_path / dtype)))
        x, zeros, slope = data.to(getattr(torch, dtype)).float(), torch.zeros_like(data), 8 * rounding / 0.25
        for _ in range(6):
            expected = online.training_losses(network, x, args, noise=noise)["loss"]
            found = stored.training_losses(network, zeros, {**args, **chains})["loss"]
            # As above, of ends alone: |a^2 - b^2| <= |a - b| (2 |b| + |a - b|).
            assert ((found - expected).abs() <= slope * (2 * expected.sqrt() + slope)).all(), (found, expected)


def test_a_store_over_data_has_its_own_windows_alone(tmp_path, network):
    chains = {CHAIN: torch.stack([chain_bytes(0), chain_bytes(1)])}
    args = {**write_over_data(tmp_path / "data", network, torch.randn(2, 4, 5, 4, 4), "float16"), **chains}
    write(tmp_path / "noise", network)
    for folder, changes, message in (
        ("data", dict(draws=dict(starts="student")), "solved with draws.starts='diffused', and this training has 'student'"),
        ("noise", dict(), "solved with draws.starts='student', and this training has 'diffused'"),
        ("data", dict(windows=2), "starts each of its windows .* at data anew"),
        ("data", dict(draws=dict(starts="diffused", grids=[2])), "starts each of its windows .* at data anew"),
        ("data", dict(curriculum=dict(windows=[4, 2])), "starts each of its windows .* at data anew"),
    ):
        scheduler = PeRFlow(**{**DIFFUSED, **changes}, teacher=dict(stored=str(tmp_path / folder)))
        with pytest.raises(ValueError, match=message):
            scheduler.training_losses(network, torch.zeros(2, 4, 5, 4, 4), args)
    for more in (dict(grids=[2]), dict()):
        curriculum = None if more else dict(windows=[4, 2])
        recipe = PeRFlow(**{**DIFFUSED, "draws": dict(starts="diffused", **more)}, curriculum=curriculum).recipe
        with pytest.raises(ValueError, match="a store has the windows of `windows` alone"):
            check_recipe(recipe)


def test_a_training_over_stored_data_measures_no_path_from_noise(tmp_path, caplog, network):
    caplog.set_level("INFO")
    args = write_over_data(tmp_path, network, torch.randn(2, 4, 5, 4, 4), "float16")
    scheduler = PeRFlow(**{**DIFFUSED, "watch": dict(every=4)}, teacher=dict(stored=str(tmp_path)))
    chains = {CHAIN: torch.stack([chain_bytes(0), chain_bytes(1)])}
    for _ in range(9):
        scheduler.training_losses(network, torch.zeros(2, 4, 5, 4, 4), {**args, **chains})["loss"].mean().backward()
    said = [record.message for record in caplog.records]
    assert any("stored chains" in one for one in said) and not any("training steps: held-out" in one for one in said)
    assert sum("measures no held-out error" in one for one in said) == 1
    (finding,) = targets(Case(scheduler.run, None, network))  # of the doctor
    assert finding.passed is None and "no path from noise" in finding.measured


def test_scales_of_mode_range_are_the_chains_own(tmp_path, monkeypatch, network):
    guidance = dict(guidance=dict(mode="range", scale=(1.0, 5.0)))
    _, noise, args = write(tmp_path, network, **guidance)
    scales = ChainStore(tmp_path).scales(torch.tensor([0, 1]))
    assert ((scales >= 1) & (scales <= 5)).all() and scales[0] != scales[1]
    monkeypatch.setattr("opensora_perflow.training.recipe.draw_scales", lambda *a, **k: scales)
    online = online_losses(monkeypatch, network, noise, args, **guidance)
    assert torch.equal(stored_losses(tmp_path, network, args, **guidance), online)


def test_windows_may_be_edges_of_the_store(tmp_path, monkeypatch, network):
    _, noise, args = write(tmp_path, network, windows=4)
    coarse = dict(windows=2, curriculum=None)
    scheduler, path = ChainStore(tmp_path), []
    for place in (0, 2, 4):
        path.append(scheduler.states(torch.tensor([0, 1]), torch.tensor([place, place])))
    found = []
    monkeypatch.setattr(segments.Stored, "of", lambda self, batch: found.append(of(self, batch)) or found[-1])
    stored_losses(tmp_path, network, args, steps=6, **coarse)
    for segment in found:
        index = (segment.t_start == 0.5).long()
        for row in range(2):
            assert torch.equal(segment.x_start[row], path[index[row]][row])
            assert torch.equal(segment.x_end[row], path[index[row] + 1][row])


of = segments.Stored.of


def test_a_student_of_a_store_is_not_taken_for_its_own_teacher(tmp_path, caplog, network):
    _, _, args = write(tmp_path, network)
    student = deepcopy(network).train()
    scheduler = PeRFlow(**{**FIXED, "watch": dict(every=100)}, draws=dict(seed=3), teacher=dict(stored=str(tmp_path)))
    chains = {CHAIN: torch.stack([chain_bytes(0), chain_bytes(1)]).bfloat16()}
    for _ in range(3):
        loss = scheduler.training_losses(student, torch.zeros(2, 4, 5, 4, 4), {**args, **chains})["loss"].mean()
        loss.backward()
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        student.zero_grad()
    assert not [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_the_run_measures_itself_without_a_teacher(tmp_path, caplog, network):
    caplog.set_level("INFO")
    _, _, args = write(tmp_path, network)
    stored_losses(tmp_path, network, args, steps=12, watch=dict(every=4))
    said = [record.message for record in caplog.records if "held-out error" in record.message]
    # Nothing was trained: the student is the untrained network, and its end is known from the store alone.
    first, second = said[0].split("held-out error ")[1].split(" ± ")[0], said[0].split("untrained network ")[1].split(" ± ")[0]
    assert first == second and float(first) > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(windows=3), "window edges .* and this training's windows .* have others"),
        (
            dict(guidance=dict(mode="fixed", scale=2.0)),
            "other guidance than this training has: scale is 3.0 there and 2.0 here",
        ),
        (dict(guidance=dict(mode="range", scale=(1.0, 5.0))), "mode is fixed there and range here"),
        (dict(objective=["perflow", dict(type="perflow_consistency")]), "perflow_consistency needs those between"),
        (dict(use_timestep_transform=True), "other settings of the scheduler than this training has: transform is None there"),
    ],
)
def test_a_store_that_does_not_fit_is_refused(tmp_path, network, config, message):
    _, _, args = write(tmp_path, network)
    with pytest.raises(ValueError, match=message):
        stored_losses(tmp_path, network, args, **config)


def test_another_teacher_than_the_stores_is_refused(tmp_path, network):
    from opensora_perflow.checkpoints import write_state_dict

    writer, _, args = write(tmp_path / "store", network)
    assert writer.origin.teacher == fingerprint(network)
    for name, other in (("own", network), ("other", tiny_network(seed=1))):
        write_state_dict(tmp_path / f"{name}.safetensors", other.state_dict())
    chains = {CHAIN: torch.stack([chain_bytes(0), chain_bytes(1)])}
    for name, raises in (("own", False), ("other", True)):
        teacher = dict(stored=str(tmp_path / "store"), from_pretrained=str(tmp_path / f"{name}.safetensors"))
        scheduler = PeRFlow(**FIXED, teacher=teacher)
        if raises:
            with pytest.raises(ValueError, match="was solved by a teacher with the fingerprint"):
                scheduler.training_losses(network, torch.zeros(2, 4, 5, 4, 4), {**args, **chains})
        else:
            scheduler.training_losses(network, torch.zeros(2, 4, 5, 4, 4), {**args, **chains})


class Config(dict):
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("other", ["", "windows", "guidance", "teacher", "seed"])
def test_a_store_of_other_chains_is_refused_before_anything_is_built(tmp_path, network, monkeypatch, other):
    plan = dict(captions=text_digest(CAPTIONS), buckets={"144p": {"17": [1.0, 2]}})
    write(tmp_path, network, "float16", plan=plan, windows=4)
    changes = dict(windows=2, guidance=dict(mode="fixed", scale=5.0), teacher=dict(from_pretrained="perflow_tiny_teacher"))
    scheduler = dict(FIXED, type="perflow", windows=4) | ({other: changes[other]} if other in changes else {})
    text = Config(type="t5", folder=None)
    settings = Config(scheduler=scheduler, dataset={}, bucket_config={"144p": {17: (1.0, 2)}}, text_encoder=text)
    settings["seed"] = 6 if other == "seed" else 5

    def build(section, registry):
        if registry == "DATASETS":
            return SimpleNamespace(data={"text": CAPTIONS})
        raise AssertionError(registry)

    monkeypatch.setattr(storing, "_build", build)
    monkeypatch.setattr(storing, "_encode", lambda *given: build(None, "begins"))
    expected = (ValueError, f"was begun with other settings: .*{other}") if other else (AssertionError, "begins")
    with pytest.raises(expected[0], match=expected[1]):
        storing.main(settings, tmp_path, None, Workers(), None)


def test_batches_and_stores_have_to_go_together(tmp_path, network):
    _, _, args = write(tmp_path, network)
    x, chains = torch.zeros(2, 4, 5, 4, 4), {CHAIN: torch.stack([chain_bytes(0), chain_bytes(9)])}
    stored = PeRFlow(**FIXED, teacher=dict(stored=str(tmp_path)))
    with pytest.raises(ValueError, match="this batch names none; use dataset"):
        stored.training_losses(network, x, args)
    with pytest.raises(ValueError, match="holds no chain 9"):
        stored.training_losses(network, x, {**args, **chains})
    with pytest.raises(ValueError, match="names stored chains; say which"):
        PeRFlow(**FIXED).training_losses(network, x, {**args, **chains})
    with pytest.raises(ValueError, match="frames that stand still"):
        stored.training_losses(network, x, {**args, **chains}, mask=torch.ones(2, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(windows=2, curriculum=dict(windows=[2, 1], teacher="previous")), 'curriculum.teacher="previous" wants a teacher'),
    ],
)
def test_what_needs_a_teacher_that_solves_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        PeRFlow(teacher=dict(stored="store"), **config)


def test_paths_that_are_not_guided_are_not_stored(network):
    with pytest.raises(ValueError, match='mode "sync" drops texts'):
        Origin.of(PeRFlow().recipe, {}, "", "", 1, "float16", 0)


def test_states_that_float16_does_not_hold_are_refused(tmp_path, network):
    writer, _, _ = write(tmp_path, network, "float16")
    for bad in (1e5, float("nan")):
        with pytest.raises(ValueError, match="not finite or too large for float16"):
            writer.write(1, 2, torch.full((2, 4, 4, 5, 4, 4), bad), CAPTIONS, TOLD)


def test_noise_that_another_torch_draws_is_refused(tmp_path, network):
    write(tmp_path, network)
    store = ChainStore(tmp_path)
    store.origin = replace(store.origin, seed=6)
    with pytest.raises(ValueError, match="draws other noise for the store"):
        store.states(torch.tensor([0]), torch.tensor([0]))


def test_chains_are_found_by_number_across_shards(tmp_path, network):
    write(tmp_path, network, first=4)
    _, noise, _ = write(tmp_path, network, first=0)
    store = ChainStore(tmp_path)
    assert len(store) == 4 and store.chains == [(0, TOLD), (1, TOLD)]  # up to the first shard that is missing
    assert store.caption(5) == CAPTIONS[1] and store.latent_shape(torch.tensor([4, 0])) == (4, 5, 4, 4)
    assert torch.equal(store.states(torch.tensor([1]), torch.tensor([0]))[0], noise[1])
    for chain in (2, 6):
        with pytest.raises(ValueError, match=f"holds no chain {chain}"):
            store.states(torch.tensor([chain]), torch.tensor([1]))


@pytest.mark.gpu
def test_chains_are_solved_on_a_gpu(network):
    """As on a CPU. Two float32 devices differ by some 1e-6 an evaluation, of which there are 16."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: run `pytest -m gpu` on a machine with one")
    x, args = batch(network)
    ends = []
    for device in ("cpu", "cuda"):
        solver = chain_solver(PeRFlow(**FIXED), deepcopy(network).to(device), None, seed=5, dtype=torch.float32)
        ends.append(solver.ends(x.to(device), {name: value.to(device) for name, value in args.items()}, 0)[0])
    torch.testing.assert_close(ends[1], ends[0], atol=1e-4, rtol=0)


def test_further_solutions_of_the_first_window_are_trained_as_often(tmp_path, monkeypatch, network):
    """Each from its own noise; other windows stay the chain's."""
    _, _, args = write(tmp_path / "more", network, further=2)
    write(tmp_path / "plain", network)
    store, chains = ChainStore(tmp_path / "more"), torch.tensor([0, 1])
    plain = ChainStore(tmp_path / "plain")
    assert "first_window" not in plain._shards.header and plain.origin.first_window == 0 and store.origin.first_window == 2
    pairs = {}
    for one in range(3):
        start, end = (store.states(chains, torch.tensor([place] * 2), torch.tensor([one] * 2)) for place in (0, 1))
        assert torch.equal(start, torch.stack([chain_noise(5, chain, (4, 5, 4, 4), one) for chain in (0, 1)]))
        # what the teacher makes of that noise alone
        solver = chain_solver(PeRFlow(**FIXED), network, None, seed=5, dtype=torch.float32)
        assert torch.equal(end, solver.ends(start, args, 0)[0][:, 0])
        pairs |= {(chain, one): (start[chain], end[chain]) for chain in (0, 1)}
    own = [store.states(chains, torch.tensor([place] * 2)) for place in range(5)]
    assert torch.equal(own[1], torch.stack([pairs[0, 0][1], pairs[1, 0][1]]))
    found = []
    monkeypatch.setattr(segments.Stored, "of", lambda self, batch: found.append(of(self, batch)) or found[-1])
    stored_losses(tmp_path / "more", network, args, steps=60)
    taken = {key: 0 for key in pairs}
    for segment in found:
        for chain in (0, 1):
            start, end, place = segment.x_start[chain], segment.x_end[chain], round(4 * (1 - segment.t_start[chain].item()))
            if place:
                assert torch.equal(start, own[place][chain]) and torch.equal(end, own[place + 1][chain])
                continue
            (key,) = [key for key, (one, _) in pairs.items() if torch.equal(start, one)]
            assert key[0] == chain and torch.equal(end, pairs[key][1])
            taken[key] += 1
    # A quarter of 120 windows, a third of them each: 10 +- 2.6 expected.
    assert min(sum(taken[chain, one] for chain in (0, 1)) for one in range(3)) >= 2


@pytest.mark.parametrize("guidance", [dict(mode="fixed", scale=3.0), dict(mode="range", scale=(1.0, 5.0))])
def test_a_solver_adds_further_solutions_of_the_first_window(network, guidance):
    _, args = batch(network)
    text = {name: args[name] for name in ("y", "mask")}
    solver = chain_solver(PeRFlow(watch=None, guidance=guidance), network, Text(args), seed=5, dtype=torch.float32)
    part = Part(CAPTIONS, TOLD, (4, 5, 4, 4), 2)
    ((ends, scales, none, _),) = solver.solve(part, 0)
    solver = replace(solver, origin=replace(solver.origin, first_window=2))
    ((same, also, further, _),) = solver.solve(part, 0)
    assert none is None and torch.equal(same, ends) and further.shape == (2, 2, 4, 5, 4, 4)
    assert (scales is None) == (guidance["mode"] == "fixed") and (scales is None or torch.equal(also, scales))
    for one in (1, 2):
        noise = torch.stack([chain_noise(5, chain, (4, 5, 4, 4), one) for chain in (0, 1)])
        told = {name: torch.tensor([float(value)] * 2) for name, value in TOLD.items()}
        assert torch.equal(further[:, one - 1], solver.ends(noise, {**text, **told}, 0)[0][:, 0])
