"""Distribution matching of Open-Sora 2.0's students: through the hooks, beside the script's one call of the network."""

from __future__ import annotations

import pytest
import torch
from mmdit import arguments, compare, hooked, note_nulls
from torch import nn

from opensora_perflow.training.fake_score import FILE_NAME, FakeScore

FIXED = dict(guidance=dict(mode="fixed", scale=3.0), watch=None, draws=dict(seed=1))


@pytest.fixture(autouse=True)
def nulls(monkeypatch):
    return note_nulls(monkeypatch)


def step(network):
    given, target = arguments()
    network.zero_grad()
    loss = compare(network(**given), target)
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


def first_step(**settings):
    network, hooks = hooked({**FIXED, **settings})
    return *step(network), hooks


def test_the_term_has_a_gradient_and_no_value():
    loss, gradient, _ = first_step()
    matched, other, hooks = first_step(matching=dict(weight=1.0))
    assert torch.equal(loss, matched) and (other - gradient).norm() > 1e-3 * gradient.norm()
    fake = hooks.run.fake
    linear = {name for name, module in hooks.host.built.named_modules() if isinstance(module, nn.Linear)}
    assert fake.weights.keys() == linear and not fake.is_on
    assert any(up.abs().max() > 0 for _, up in fake.weights.values())


def test_where_both_scores_are_equal_there_is_nothing_to_match():
    """Adapters that a rate of 1e-30 keeps as they are add nothing, and scale 1 guides nothing: the scores are one."""
    scale_one = dict(guidance=dict(mode="fixed", scale=1.0))
    loss, gradient, _ = first_step(**scale_one)
    matched, other, _ = first_step(**scale_one, matching=dict(weight=1.0, rate=1e-30))
    assert torch.equal(loss, matched) and torch.equal(gradient, other)


def test_the_adapters_gradient_is_that_of_their_loss(monkeypatch):
    """The first update's, by a difference quotient in one number of an adapter: float32 leaves 1 % of it."""
    seen, fit = [], FakeScore.fit
    monkeypatch.setattr(FakeScore, "fit", lambda self, *given: seen.append(given) or fit(self, *given))
    *_, hooks = first_step(matching=dict(rate=1e-30))
    fake, (batch, x_end, t_end, _, host) = hooks.run.fake, seen[0]
    name, (_, up) = max(fake.weights.items(), key=lambda item: item[1][1].grad.abs().max())
    place = divmod(int(up.grad.abs().argmax()), up.shape[1])
    generator = torch.Generator()
    fake.fit(batch, x_end, t_end, generator.manual_seed(3), host)
    gradient, losses = up.grad[place].item(), []
    from opensora_perflow.method.matching import renoise

    with torch.no_grad(), fake.on():
        for sign in (1, -1):
            up[place] += sign * 1e-2
            state = renoise(x_end, t_end, generator.manual_seed(3))
            losses.append(state.error(fake.velocity(batch, state), x_end).square().mean().item())
            up[place] -= sign * 1e-2
    assert abs((losses[0] - losses[1]) / 2e-2 - gradient) < 0.01 * abs(gradient), name


def test_the_teacher_checkpoints_where_the_student_does(monkeypatch):
    """train.py says so after the teacher was built; solutions and scores without a gradient do not."""
    network, hooks = hooked({**FIXED, "matching": dict(weight=1.0)})
    network.out.grad_checkpointing = True
    seen, forward = [], hooks.host.built.out.forward

    def noted(inputs):
        seen.append((hooks.host.built.out.grad_checkpointing, torch.is_grad_enabled()))
        return forward(inputs)

    hooks.host.built.out.forward = noted
    step(network)
    assert seen.count((True, True)) == 1 and all(checkpointed == graph for checkpointed, graph in seen)
    assert network.out.grad_checkpointing and len(seen) > 2


def test_a_saved_state_goes_on_as_it_would_have(tmp_path):
    network, hooks = hooked({**FIXED, "matching": dict(weight=1.0)})
    step(network)
    hooks.run.fake.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    other = hooked({**FIXED, "matching": dict(weight=1.0)})
    step(other[0])
    other[1].run.fake.load(tmp_path)
    for one, two in zip(hooks.run.fake.weights.values(), other[1].run.fake.weights.values()):
        assert all(torch.equal(*pair) for pair in zip(one, two))
