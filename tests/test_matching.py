"""Distribution matching: exact scores of a Gaussian, what the adapters learn, and what a run keeps of them."""

import logging
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from networks import batch, tiny_network
from problems import Gaussian
from processes import in_two_processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora_perflow import PeRFlow
from opensora_perflow.hosts.parallel import average_over_ranks
from opensora_perflow.hosts.v1.host import OpenSora
from opensora_perflow.hosts.v1.lora import LoRA, add_adapters
from opensora_perflow.method.matching import renoise
from opensora_perflow.method.process import Linear
from opensora_perflow.training.adapters import adapter_state, teacher_call
from opensora_perflow.training.fake_score import FILE_NAME, FakeScore
from opensora_perflow.training.matching import MatchingSettings
from opensora_perflow.training.players import Player
from opensora_perflow.worlds.mixture import ClassText, Mixture, MixtureNetwork
from opensora_perflow.worlds.model import TinySTDiT

FIXED = dict(guidance=dict(mode="fixed", scale=3.0), watch=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("t_end", [0.0, 0.3, 0.9])
def test_the_mean_before_is_that_of_a_gaussian(t_end):
    """x_s ~ N(m_s, V) and x_t = alpha x_s + sigma noise give E[x_s | x_t] in closed form. float64: algebra to 1e-9."""
    flow, s = Gaussian(), torch.full((64,), t_end, dtype=torch.float64)
    x_end = (1 - t_end) * flow.m + flow.std(s)[:, None] * torch.randn(64, 5, dtype=torch.float64, generator=generator())
    state = renoise(x_end, s, generator(1))
    assert ((state.t > s) & (state.t < 1)).all()
    before, alpha = flow.std(s) ** 2, state.alpha
    after = alpha**2 * before + state.variance
    torch.testing.assert_close(after, flow.std(state.t) ** 2, rtol=1e-12, atol=0)  # as the path itself at t
    mean = (1 - t_end) * flow.m
    expected = mean + (before * alpha / after)[:, None] * (state.x - alpha[:, None] * mean)
    torch.testing.assert_close(state.mean_before(flow(state.x, state.t)), expected, rtol=1e-9, atol=1e-9)


def test_the_error_at_clean_data_is_that_of_flow_matching():
    data, t_end = torch.randn(8, 3, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    state, t = renoise(data, t_end, generator()), renoise(data, t_end, generator()).t[:, None]
    noise, v = (state.x - (1 - t) * data) / t, torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close(state.error(v, data).abs(), (v - (noise - data)).abs(), rtol=1e-9, atol=1e-9)


def steps(scheduler: PeRFlow, network: torch.nn.Module, count: int, seed: int = 0) -> list[Tensor]:
    """Losses of SGD steps on batches of their own."""
    optimizer, found = torch.optim.SGD(network.parameters(), lr=0.1), []
    for step in range(count):
        torch.manual_seed(seed + step)
        loss = scheduler.training_losses(network, *batch(network))["loss"]
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        found.append(loss.detach())
    return found


def gradients(**settings) -> tuple[Tensor, Tensor, PeRFlow]:
    """(loss, gradient, scheduler) of a first step."""
    network, scheduler = tiny_network().train(), PeRFlow(**{**FIXED, "draws": dict(seed=1), **settings})
    torch.manual_seed(0)
    loss = scheduler.training_losses(network, *batch(network))["loss"]
    loss.mean().backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]), scheduler


def test_the_term_has_a_gradient_and_no_value():
    loss, gradient, _ = gradients()
    matched, other, scheduler = gradients(matching=dict(weight=1.0))
    assert torch.equal(loss, matched) and (other - gradient).norm() > 1e-3 * gradient.norm()
    assert scheduler.run.fake.weights and not scheduler.run.fake.is_on


def test_the_answer_that_is_matched_has_a_graph():
    """perflow_consistency asks the student for its target first, without a gradient."""
    settings = dict(objective="perflow_consistency")
    (_, gradient, _), (_, other, _) = gradients(**settings), gradients(**settings, matching=dict(weight=1.0))
    assert (other - gradient).norm() > 1e-3 * gradient.norm()


def test_adapters_that_diverge_end_the_run_before_the_student_s_weights_do():
    network, scheduler = tiny_network().train(), PeRFlow(**FIXED, matching=dict(rate=1e9))
    with pytest.raises(ValueError, match="adapters diverged: with matching.rate=1e\\+09 their score is not finite"):
        scheduler.training_losses(network, *batch(network))


def test_a_live_run_keeps_its_matching():
    network, scheduler = tiny_network().train(), PeRFlow(**FIXED)
    scheduler.training_losses(network, *batch(network))
    with pytest.raises(ValueError, match="this run began with matching=None"):
        scheduler.__init__(**FIXED, matching=dict(weight=0.5))
    scheduler.__init__(**FIXED, cfg_scale=2.0)


def test_where_both_scores_are_equal_there_is_nothing_to_match():
    """Adapters that a rate of 1e-30 keeps as they are add nothing, and scale 1 guides nothing: the scores are one."""
    scale_one = dict(guidance=dict(mode="fixed", scale=1.0))
    loss, gradient, _ = gradients(**scale_one)
    matched, other, _ = gradients(**scale_one, matching=dict(weight=1.0, rate=1e-30))
    assert torch.equal(loss, matched) and torch.equal(gradient, other)


def test_adapters_that_are_off_leave_the_teacher_as_it_is():
    network, (x, args) = tiny_network(), batch(tiny_network())
    t = torch.full((2,), 500.0)
    with torch.no_grad():
        before = network(x, t, **args)
        fake = FakeScore(network, MatchingSettings(rank=2))
        new = network(x, t, **args)
        for _, up in fake.weights.values():
            up.add_(1.0)
        off = network(x, t, **args)
        with fake.on():
            on = network(x, t, **args)
    assert torch.equal(before, new) and torch.equal(before, off) and (on - before).abs().max() > 0.1


def test_the_adapters_learn_the_score_of_one_point(monkeypatch):
    """Where the student makes one and the same point c, E[x_s | x_t] = c at every x_t. The teacher says something else.

    300 updates leave a third of the teacher's distance; a half is asked for.
    """
    torch.manual_seed(0)
    mixture, classes = Mixture.standard(), torch.zeros(64, dtype=torch.int64)
    network = MixtureNetwork(mixture, width=64).train()
    scheduler = PeRFlow(**FIXED, windows=2, draws=dict(seed=0), matching=dict(rate=3e-3, rank=32))
    data, args = mixture.draw(classes), ClassText().of(classes)
    found, term = [], FakeScore.term
    monkeypatch.setattr(FakeScore, "term", lambda self, *given: found.append(given) or term(self, *given))
    scheduler.training_losses(network, data, args)
    given, fake, host = found[0][0], scheduler.run.fake, scheduler.host
    point, t_end = torch.full_like(data, 0.7), torch.full((64,), 0.5, dtype=torch.float64)
    state = renoise(point, t_end, generator(5))

    def distance() -> float:
        with torch.no_grad(), fake.on():
            return (state.mean_before(fake.velocity(given, state)) - point).square().mean().sqrt().item()

    first = distance()
    for update in range(300):
        fake.fit(given, point, t_end, generator(10 + update), host)
    assert distance() < first / 2


def test_frames_that_stand_still_are_not_noised():
    """Whatever the teacher is asked, its frame that stands still is the data's: in the solution and in the matching."""
    network, scheduler = tiny_network().train(), PeRFlow(**FIXED, matching=dict(weight=1.0))
    x, args = batch(network)
    mask = torch.tensor([[True] * 5, [False] + [True] * 4])
    scheduler.training_losses(network, x, {**args, "x_mask": mask}, mask=mask)
    seen = []
    scheduler.run.teacher.network.register_forward_pre_hook(
        lambda module, given: seen.append((scheduler.run.fake.is_on, given[0]))
    )
    scheduler.training_losses(network, x, {**args, "x_mask": mask}, mask=mask)
    assert [on for on, _ in seen].count(True) == 2  # an update, and the fake score
    assert all(torch.equal(states[1, :, 0], x[1, :, 0]) for _, states in seen)


class Checkpointed(TinySTDiT):
    """Checkpoints the gradient of its first block as Open-Sora's networks do theirs."""

    def __init__(self, **settings):
        super().__init__(**settings)
        block, self.repeated = self.spatial_blocks[0], 0
        forward = block.forward

        def counted(*given):
            self.repeated += 1
            return forward(*given)

        block.forward = lambda *given: (
            checkpoint(counted, *given, use_reentrant=False) if block.grad_checkpointing else counted(*given)
        )
        block.grad_checkpointing = False


def test_gradients_are_checkpointed_where_the_student_s_are():
    """The same adapters after three updates, to rounding, with a block evaluated twice in each."""
    found = []
    for kind in (TinySTDiT, Checkpointed):
        torch.manual_seed(0)
        network = kind(hidden_size=32, depth=1, num_heads=2)
        fake = FakeScore(network, MatchingSettings(rank=2))
        fit(fake, network, *batch(network))
        found.append(torch.cat([up.detach().flatten() for _, up in fake.weights.values()]))
    assert network.repeated == 6 and not network.spatial_blocks[0].grad_checkpointing
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def average_worker(rank):
    tensors = [torch.tensor([1.0, 4.0][rank]), torch.full((2, 3), float(rank))]
    average_over_ranks(tensors)
    assert tensors[0] == 2.5 and torch.equal(tensors[1], torch.full((2, 3), 0.5))
    torch.manual_seed(rank)  # other data in each process
    network = tiny_network().train()
    scheduler = PeRFlow(**FIXED, draws=dict(seed=0), matching=dict(weight=1.0, updates=2))
    for _ in range(2):
        scheduler.training_losses(network, torch.randn(2, 4, 5, 4, 4), batch(network)[1])
    ups = torch.cat([up.detach().flatten() for _, up in scheduler.run.fake.weights.values()])
    everyone = scheduler.host.gathered(ups)
    assert torch.equal(*everyone) and ups.abs().max() > 0


def test_adapters_are_the_same_in_all_processes(tmp_path):
    in_two_processes(average_worker, tmp_path)


def test_a_rollback_puts_the_adapters_back():
    """A run's copy puts back adapters and their optimizer: three further steps then change them as they did before."""
    network, scheduler = tiny_network().train(), PeRFlow(**FIXED, draws=dict(seed=0), matching=dict(weight=1.0))
    steps(scheduler, network, 2)
    run, found = scheduler.run, []
    put_back, student = run.keep_state(), deepcopy(network.state_dict())  # no script's optimizer knows the student here
    for _ in range(2):
        put_back()
        network.load_state_dict(student)
        run.randomness.steps = 2
        steps(scheduler, network, 3)
        found.append(torch.cat([part.detach().flatten() for pair in run.fake.weights.values() for part in pair]))
    assert torch.equal(*found)


def test_a_saved_state_goes_on_as_it_would_have(tmp_path, caplog):
    """Adapters and their optimizer, to the bit; of another rank they are refused."""
    settings = dict(**FIXED, draws=dict(seed=0), matching=dict(weight=1.0))
    network, scheduler = tiny_network().train(), PeRFlow(**settings)
    steps(scheduler, network, 2)
    fake = scheduler.run.fake
    fake.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    again = FakeScore(scheduler.run.teacher.network, fake.settings)
    again.load(tmp_path)
    for (name, one), other in zip(fake.weights.items(), again.weights.values()):
        for mine, theirs in zip(one, other):
            assert torch.equal(mine, theirs), name
            kept, found = fake.optimizer.state[mine], again.optimizer.state[theirs]
            assert kept.keys() == found.keys() and all(torch.equal(kept[key], found[key]) for key in kept)
    with pytest.raises(ValueError, match="other adapters than matching.rank=3 gives this network"):
        FakeScore(scheduler.run.teacher.network, MatchingSettings(rank=3)).load(tmp_path)
    with caplog.at_level(logging.WARNING):
        again.load(tmp_path / "nothing")
    assert "begins with new adapters" in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(teacher=dict(stored="folder")), "stored chains, and matching wants a teacher that is asked"),
        (dict(path="ddpm"), "not of iddpm networks"),
        (dict(teacher=dict(allow_distilled=True)), "nor of students"),
        (dict(curriculum=dict(windows=[4, 2], teacher="previous")), "nor of students"),
    ],
)
def test_what_matching_cannot_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PeRFlow(matching=dict(weight=0.5), **settings).process_of(tiny_network())


@pytest.fixture
def shared():
    """A student of adapters, moved, which is its own teacher without them."""
    pytest.importorskip("peft")
    network = add_adapters(tiny_network(), LoRA(rank=2)).train()
    with torch.no_grad():
        for name, weight in adapter_state(network).items():
            if "lora_B" in name:
                weight.fill_(0.1)
    return network


def test_a_student_of_adapters_shares_its_network_with_both_scores(shared):
    """Three fields of one network: the student's adapters are off where this score's are on, and neither meets the other's
    gradient."""
    network, base, (x, args) = shared, tiny_network(), batch(shared)
    t = torch.full((2,), 500.0)
    with torch.no_grad():
        student = network(x, t, **args)
    fake, found = FakeScore(network, MatchingSettings(rank=2)), []
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    assert {name.removesuffix(".base_layer") for name in fake.weights} == linear
    with fake.on():
        assert torch.equal(network(x, t, **args), base(x, t, **args))  # as new adapters add nothing
    fit(fake, network, x, args)
    assert all(weight.grad is None for weight in network.parameters())
    with torch.no_grad():
        assert torch.equal(network(x, t, **args), student) and network.training
        assert torch.equal(teacher_call(network, network)(x, t, **args), base(x, t, **args))
    other = FakeScore(base.eval().requires_grad_(False), MatchingSettings(rank=2))
    fit(other, base, x, args)
    found = [torch.cat([part.flatten() for pair in one.weights.values() for part in pair]) for one in (fake, other)]
    assert torch.equal(*found)


def test_a_student_of_adapters_is_matched(shared):
    """As one whose teacher is another network: the same loss and the same gradients, to the last bit. Not yet moved, since the
    copy takes the student's weights for the teacher's."""
    with torch.no_grad():
        for name, weight in adapter_state(shared).items():
            if "lora_B" in name:
                weight.zero_()
    own = vars(shared).pop("__deepcopy__")
    other = deepcopy(shared)
    shared.__deepcopy__ = own
    del other.perflow_lora  # so that its teacher is a copy
    x, args = batch(shared)
    found = []
    for network in (shared, other):
        scheduler = PeRFlow(**FIXED, draws=dict(seed=0), matching=dict(weight=1.0))
        torch.manual_seed(3)
        loss = scheduler.training_losses(network, x, dict(args))["loss"].mean()
        loss.backward()
        gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
        found.append((loss.detach(), gradients))
        assert (scheduler.run.teacher.network is network) == (network is shared)
    assert torch.equal(found[0][0], found[1][0]) and found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_a_backward_repeats_the_forward_without_the_student_s_adapters():
    """Gradients that are checkpointed, where the student's network checkpoints them itself."""
    pytest.importorskip("peft")
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = Checkpointed(hidden_size=32, depth=1, num_heads=2)
        network = add_adapters(network, LoRA(rank=2)).train()
        with torch.no_grad():
            for name, weight in adapter_state(network).items():
                weight.fill_(0.1 if "lora_B" in name else weight.mean())
        network.spatial_blocks[0].grad_checkpointing = checkpointing
        fake = FakeScore(network, MatchingSettings(rank=2))
        fit(fake, network, *batch(network))
        assert network.spatial_blocks[0].grad_checkpointing == checkpointing and network.repeated == 3 * (1 + checkpointing)
        found.append(torch.cat([up.detach().flatten() for _, up in fake.weights.values()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


def fit(fake, network, x, args):
    """Three updates towards ends of ones."""
    player = Player(lambda states, t: network(states, t, **args)[:, :4], Linear(), "velocity")
    players = SimpleNamespace(process=player.process, moving=None, untrained=lambda: player)
    given = SimpleNamespace(players=players, frame_weights=None)
    for update in range(3):
        fake.fit(given, torch.ones_like(x), torch.zeros(2, dtype=torch.float64), generator(update), OpenSora())
