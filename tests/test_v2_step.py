"""A training step of Open-Sora 2.0 through the hooks: exact losses, one call of the network, and who is told what."""

from __future__ import annotations

import logging
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from mmdit import CHANNELS, EULER, LAYOUT, TinyMMDiT, arguments, compare, hooked, note_nulls, told
from torch import Tensor

from opensora_perflow.conventions import expand_like
from opensora_perflow.hosts.v2.evaluation import Evaluation
from opensora_perflow.hosts.v2.flux import PeRFlowFlux, hooks_of
from opensora_perflow.hosts.v2.prediction import Prediction
from opensora_perflow.hosts.v2.training_call import renoised
from opensora_perflow.training.curriculum import AdvanceRule
from opensora_perflow.training.randomness import step_generator

FIXED = dict(guidance=dict(mode="fixed", scale=3.0))


@pytest.fixture(autouse=True)
def nulls(monkeypatch):
    return note_nulls(monkeypatch)


def one_step(network, hooks, target=None, **options):
    """(loss, the batch, the segment), as train.py has the loss."""
    given, velocity = arguments(**options)
    seen = []
    handle = network.register_forward_pre_hook(lambda *_: seen.append(hooks._step))
    loss = compare(network(**given), velocity if target is None else target)
    handle.remove()
    (_, batch, segment) = seen[0]
    return loss, batch, segment


def plain(network, x, t, dtype=torch.float32, **others):
    """What the bare network says of latents."""
    given = {**told(dtype=dtype), **others}
    said = TinyMMDiT.forward(network, img=LAYOUT.pack(x).to(dtype), timesteps=t.to(dtype), **given)
    return LAYOUT.unpack(said.float())


@pytest.mark.parametrize("starts", ["student", "diffused"])
def test_an_untrained_student_knows_one_euler_step(starts):
    """At the windows' edges its line is the teacher's own step: what is left is float32's rounding of (x_e - x_s) / dt."""
    network, hooks = hooked(dict(teacher=EULER["teacher"], draws=dict(edge_mass=1.0, starts=starts), windows=4))
    loss, _, _ = one_step(network, hooks)
    assert loss.item() <= 1e-12


@pytest.mark.parametrize("per_solve", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_closed_form(per_solve, dtype, nulls, monkeypatch):
    """Of the segment: the weighted mean over the times of the squared distance to its slope, to the last bit. All times of a
    sample are rows of one call."""
    note_nulls(monkeypatch, dtype=dtype)
    network, hooks = hooked({**FIXED, "draws": dict(per_solve=per_solve)}, dtype=dtype)
    loss, batch, segment = one_step(network, hooks, dtype=dtype)
    assert network.rows[-1] == 2 * per_solve
    states = [segment.point(t) for t in batch.drawn.times]
    repeated = {name: value.repeat(per_solve, 1, 1) if value.dim() == 3 else value.repeat(per_solve, 1)
                for name, value in told(dtype=dtype).items()}  # fmt: skip
    answers = plain(network, torch.cat(states), torch.cat(list(batch.drawn.times)), dtype, **repeated).chunk(per_solve)
    expected = sum(
        (answer - segment.velocity).square().flatten(1).mean(1) * weight.float()
        for answer, weight in zip(answers, batch.drawn.weights)
    ).mean()
    assert torch.equal(loss, expected) and loss > 1e-4
    (mine,) = torch.autograd.grad(loss, [network.out.weight], retain_graph=True)
    assert torch.equal(mine, torch.autograd.grad(expected, [network.out.weight])[0])


def test_the_segment_is_the_teacher_s_guided_solution(nulls):
    """One window: its start is the step's noise, and one Euler step of null + 3 (text - null) leads to its end, exactly."""
    network, hooks = hooked({**FIXED, **EULER, "windows": 1})
    loss, batch, segment = one_step(network, hooks)
    generator = step_generator(torch.initial_seed(), 0, 0)
    torch.rand(2, dtype=torch.float64, generator=generator)  # the windows
    torch.rand((0, 2), dtype=torch.float64, generator=generator)
    torch.rand(2, dtype=torch.float64, generator=generator)  # edge or not
    noise = torch.randn(2, CHANNELS, 3, 4, 8, generator=generator)
    assert torch.equal(segment.x_start, noise)
    t = torch.ones(2)
    text, null = plain(network, noise, t), plain(network, noise, t, **{k: v.expand_as(told()[k]) for k, v in nulls.items()})
    torch.testing.assert_close(segment.x_end, noise - (null + 3.0 * (text - null)), rtol=0, atol=1e-5)  # rows of one call
    torch.testing.assert_close(loss, (2.0 * (text - null)).square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("objective", ["perflow", "perflow_phased", "perflow_direction", "perflow_consistency",
                                       ["perflow", dict(type="perflow_consistency", weight=0.5)]])  # fmt: skip
def test_every_objective_has_the_loss_that_it_has_on_its_own(objective):
    """The rehearsal changes nothing: evaluating the student where the objective asks gives the same loss, up to the order of
    sums in a batch of more rows."""
    network, hooks = hooked({**FIXED, "objective": objective, "windows": 2})
    loss, batch, segment = one_step(network, hooks)
    student = lambda x, t: plain(network, x, t)  # noqa: E731
    own = sum(
        hooks.objective(student, segment, t, None) * weight.float() for t, weight in zip(batch.drawn.times, batch.drawn.weights)
    )
    torch.testing.assert_close(loss, own.mean(), rtol=1e-5, atol=1e-7)
    loss.backward()
    assert network.out.weight.grad.abs().sum() > 0


def evaluation(direct=None):
    return Evaluation(direct or (lambda x, t, step: x * 2), told(), LAYOUT)


def test_a_rehearsed_evaluation_is_replayed():
    x, t = torch.randn(2, CHANNELS, 3, 4, 8), torch.tensor([0.5, 0.25], dtype=torch.float64)
    output = evaluation()
    assert not output(x, t).any() and not output(x + 1, t / 2).any()
    with torch.no_grad():
        assert not output(x, t).any()  # no question of its own: it gets no rows
    inputs = output.inputs(torch.bfloat16)
    assert inputs["img"].shape == (4, 24, 8) and inputs["img"].dtype == inputs["timesteps"].dtype == torch.bfloat16
    assert inputs["timesteps"].tolist() == [0.5, 0.25, 0.25, 0.125]
    assert all(torch.equal(inputs[name], torch.cat([value, value])) for name, value in told().items())
    answer = torch.randn(4, 24, 8, requires_grad=True)
    output.answer(answer)
    with torch.no_grad():
        assert torch.equal(output(x, t), x * 2)
    assert torch.equal(output(x, t), LAYOUT.unpack(answer[:2])) and torch.equal(output(x + 1, t / 2), LAYOUT.unpack(answer[2:]))


@pytest.mark.parametrize("asked", [lambda x, v: x + v, lambda x, v: x * 1.0 if v.any() else x + 1])
def test_an_answer_that_leads_on_is_refused(asked):
    """The second question depends on the first answer, which the rehearsal does not know."""
    output, x, t = evaluation(), torch.randn(2, CHANNELS, 3, 4, 8), torch.tensor([0.5, 0.5])
    output(asked(x, output(x, t)), t)
    output.answer(torch.randn(4, 24, 8))
    with pytest.raises(ValueError, match="where an earlier answer of the student leads; .* one evaluation a step"):
        output(asked(x, output(x, t)), t)


def test_more_questions_than_rehearsed_are_refused():
    output, x, t = evaluation(), torch.randn(2, CHANNELS, 3, 4, 8), torch.tensor([0.5, 0.5])
    output(x, t)
    output.answer(torch.randn(2, 24, 8))
    output(x, t)
    with pytest.raises(ValueError, match="makes one evaluation a step"):
        output(x, t)


def prediction(said=None):
    weight = torch.tensor(2.0, requires_grad=True)
    output, loss = weight * torch.ones(2, 3, dtype=torch.bfloat16), weight * 5
    seen = []
    return Prediction.of(output, loss, seen.append), weight, loss, seen


@pytest.mark.parametrize(
    "way",
    [
        lambda p: p.float(),
        lambda p: p.to(torch.float32).clone(),
        lambda p: p.clone().contiguous().float().to(torch.float64),
    ],
)
def test_the_script_s_loss_is_ours(way):
    answer, weight, loss, seen = prediction()
    target = torch.zeros(2, 3)
    found = F.mse_loss(way(answer), target, reduction="mean")
    assert found is loss and type(found) is Tensor
    F.mse_loss(way(answer), target=target)
    assert len(seen) == 1 and seen[0].data_ptr() == target.data_ptr()  # told once
    (found / 2).backward()
    assert weight.grad == 2.5


def test_what_else_is_done_to_an_answer_is_plain():
    answer, _, _, _ = prediction()
    assert type(answer + 1) is Tensor and type(answer[0]) is Tensor and type(answer.float()) is Prediction
    assert torch.equal(answer.detach() * 2, torch.full((2, 3), 4.0, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "use", [lambda p: p.square().sum(), lambda p: F.mse_loss(p[:, 1:].float(), torch.zeros(2, 2)), lambda p: p.sum()]
)
def test_an_answer_without_its_loss_is_not_trained_on(use):
    answer, weight, _, _ = prediction()
    with pytest.raises(RuntimeError, match="without its PeRFlow loss: F.mse_loss has not seen the answer"):
        use(answer).backward()
    assert weight.grad is None


def test_a_frozen_student_is_told_before_any_step():
    network, hooks = hooked(EULER)
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="the student has 0 trainable parameters"):
        one_step(network, hooks)


def test_renoised_points_have_the_law_of_their_time():
    """Given the data, mean and variance are those of (1 - t_s) data + t_s noise: in closed form. x_t = (1 - t) data + t e with
    independent e, so that both coefficients can be read off."""
    t = torch.tensor([0.0, 1e-8, 0.2, 0.5, 0.8, 0.999], dtype=torch.float64)
    for t_start in (torch.full_like(t, 0.9991), t.clone().clamp(min=1e-9), torch.ones_like(t)):
        one, zero = torch.ones(6, 1, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64)

        def at_start(x_t, fresh, t_start=t_start):
            data, noise = renoised(x_t, t, fresh, t_start)
            return (expand_like(1 - t_start, x_t) * data + expand_like(t_start, x_t) * noise)[:, 0]

        of_data = at_start(expand_like(1 - t, one), zero)
        of_old, of_new = at_start(expand_like(t, one), zero), at_start(zero, one)
        torch.testing.assert_close(of_data, 1 - t_start, rtol=0, atol=1e-12)
        # sqrt(t_s^2 - a^2 t^2) of nearly equal numbers: half the digits.
        torch.testing.assert_close((of_old**2 + of_new**2).sqrt(), t_start, rtol=0, atol=1e-9)


def test_time_one_has_noise_only():
    one = torch.ones(1, dtype=torch.float64)
    data, noise = renoised(torch.full((1, 2), 3.0), one, torch.full((1, 2), 5.0), one)
    assert noise.tolist() == [[5.0, 5.0]] and torch.isfinite(data).all()


@pytest.mark.parametrize("draws", [{}, dict(grids=[3, 7])], ids=["windows", "grids"])
@pytest.mark.parametrize("windows", [4, [1.0, 0.5, 0.1, 0.0], [1.0, 0.97, 0.9, 0.0]])
def test_diffused_starts_never_have_less_noise_than_the_data_came_with(windows, draws):
    """Noise can be added to x_t and not taken away, whatever windows there are: their start is at least its level."""
    network, hooks = hooked(dict(windows=windows, draws=dict(starts="diffused", **draws)))
    for first in torch.linspace(0.02, 1.0, 15):
        given, target = arguments()
        given["timesteps"] = torch.stack([first, first * 0.9])
        seen = []
        handle = network.register_forward_pre_hook(lambda *_, seen=seen: seen.append(hooks._step))
        compare(network(**given), target)
        handle.remove()
        _, batch, segment = seen[0]
        assert (segment.t_start >= given["timesteps"].double() - 1e-6).all()


def test_the_level_of_noise_is_what_bfloat16_left():
    """T38: train.py rounds 1 - t, so that x_t has the noise 1 - bf16(1 - t)."""
    network, hooks = hooked(dict(draws=dict(starts="diffused")), dtype=torch.bfloat16)
    given, target = arguments(dtype=torch.bfloat16)
    given["timesteps"] = torch.tensor([0.00123, 0.7]).bfloat16()
    seen = []
    network.register_forward_pre_hook(lambda *_: seen.append(hooks._step[0].level))
    network(**given)
    assert torch.equal(seen[0], 1.0 - (1 - given["timesteps"]).double())
    assert seen[0][0] != given["timesteps"][0].double()


def test_data_and_noise_of_the_script_are_found_again():
    """x_1 = x_t + (1 - t) v and x_0 = x_1 - v, up to sigma_min."""
    network, hooks = hooked(dict(draws=dict(starts="diffused")))
    given, target = arguments()
    seen = []
    network.register_forward_pre_hook(lambda *_: seen.append(hooks._step))
    network(**given)
    call, batch, _ = seen[0]
    compared = call.compared(batch, target)
    data = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(LAYOUT.pack(compared.data), data, rtol=0, atol=1e-4)


def test_ranks_and_steps_draw_apart():
    """T47: every rank is seeded alike, so that draws are of (seed, rank, step)."""

    def starts(rank, steps=2):
        network, hooks = hooked(EULER)
        hooks.host.rank = lambda: rank
        torch.manual_seed(42)
        return [one_step(network, hooks)[2].x_start for _ in range(steps)]

    (one, two), (again, _), (other, _) = starts(0), starts(0), starts(1)
    assert torch.equal(one, again) and not torch.equal(one, two) and not torch.equal(one, other)


def test_nan_text_is_blamed_on_the_text():
    network, hooks = hooked(FIXED)
    given, _ = arguments()
    given["txt"] = given["txt"].clone()
    given["txt"][1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="the text embeddings, an input of this step: it holds NaN .* 1 of 2 samples.*step 1"):
        network(**given)


def test_student_starts_need_no_latents():
    """Only their shape: whatever they hold, the loss is the same to the last bit."""
    losses = []
    for value in (0.0, 5.0, float("nan")):
        network, hooks = hooked(FIXED)
        given, target = arguments()
        given["img"] = torch.full_like(given["img"], value)
        losses.append(compare(network(**given), target))
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


def test_nan_latents_are_blamed_on_the_latents():
    network, hooks = hooked(dict(draws=dict(starts="diffused")))
    given, _ = arguments()
    given["img"] = given["img"].clone()
    given["img"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="the latents, an input of this step: it holds NaN .* 1 of 2 samples"):
        network(**given)


def test_a_broken_student_is_blamed():
    network, hooks = hooked(dict(windows=1))
    with torch.no_grad():
        network.out.bias[0] = float("nan")
    with pytest.raises(ValueError, match="the student .* returned NaN .*1 of its weights are not finite, out.bias"):
        compare(network(**arguments()[0]), arguments()[1])


@pytest.mark.parametrize("missing", ["img", "txt", "y_vec", "timesteps", "img_ids"])
def test_a_missing_argument_is_named(missing):
    network, hooks = hooked(EULER)
    given, _ = arguments()
    del given[missing]
    with pytest.raises(ValueError, match=f"called without .*{missing}"):
        network(**given)


def test_arguments_without_names_are_refused():
    network, _ = hooked(EULER)
    with pytest.raises(ValueError, match="called by keywords, got 1 arguments without names"):
        network(arguments()[0]["img"])


def test_no_reference_frames_are_zeros():
    """T59: without condition_config train.py passes no cond, which the network wants."""
    network, hooks = hooked({**FIXED, "windows": 2})
    given, target = arguments()
    with_zeros = compare(network(**given), target)
    hooks.run = None
    del given["cond"]
    assert torch.equal(compare(network(**given), target), with_zeros)
    network.eval()
    assert network(**given).shape == (2, 24, 8)


def test_a_network_without_cond_is_told_none():
    network, hooks = hooked({**FIXED, "windows": 2}, cond_embed=False)
    assert torch.isfinite(one_step(network, hooks)[0])


def test_mode_range_tells_the_scale():
    network, hooks = hooked(dict(guidance=dict(mode="range", scale=(2.0, 6.0)), windows=2), guidance_embed=True)
    given = []
    network.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs["guidance"]), with_kwargs=True)
    for _ in range(3):
        loss, batch, _ = one_step(network, hooks)
        assert torch.equal(given[-1], batch.scale.float().repeat(2)) and (batch.scale >= 2).all() and (batch.scale < 6).all()
    assert not torch.equal(given[0], given[1])


def test_the_teacher_is_looked_at_once(caplog):
    network, hooks = hooked(EULER)
    with caplog.at_level(logging.INFO, "opensora_perflow"):
        one_step(network, hooks)
        one_step(network, hooks)
    looked = [record for record in caplog.records if "teacher" in record.message and "cosine" in record.message]
    assert len(looked) == 1


def test_no_gradient_no_step():
    """A validation in training mode: the network answers for itself."""
    network, hooks = hooked(EULER)
    given, _ = arguments()
    with torch.no_grad():
        assert torch.equal(network(**given), TinyMMDiT.forward(network, **given))
    assert hooks.run is None


def test_copies_share_the_hooks():
    """train.py's EMA copies the network: the copy has neither teacher nor run of its own, and its weights are its own."""
    network, hooks = hooked(EULER)
    one_step(network, hooks)
    ema = deepcopy(network)
    assert hooks_of(ema) == (hooks, ema) and deepcopy(hooks) is hooks
    assert ema.out.weight.data_ptr() != network.out.weight.data_ptr()
    with torch.no_grad():
        ema.eval().out.bias += 1
        given, _ = arguments()
        torch.testing.assert_close(ema(**given), TinyMMDiT.forward(network, **given) + 1)


def test_a_network_without_hooks_has_none():
    assert hooks_of(TinyMMDiT()) is None and PeRFlowFlux().recipe.windows.num_windows == 4


def test_a_run_measures_itself(caplog):
    """Its own steps against the teacher's, on the batches that it keeps: evaluations without a gradient, past the one call."""
    network, hooks = hooked({**FIXED, "windows": 2, "watch": dict(every=1)})
    with caplog.at_level(logging.INFO, "opensora_perflow"):
        for _ in range(20):
            one_step(network, hooks)[0].backward()
    assert [record for record in caplog.records if "training step" in record.message and "error" in record.message]
    assert all(parameter.grad is None for parameter in hooks.run.teacher.network.parameters())


@pytest.mark.parametrize("teacher", ["original", "previous"])
def test_a_curriculum_merges_windows(teacher, monkeypatch):
    stages = dict(windows=[4, 2, 1], teacher=teacher, advance=dict(min_steps=1, max_steps=2))
    monkeypatch.setattr(AdvanceRule, "every", 1)
    network, hooks = hooked({**FIXED, "windows": 4, "curriculum": stages})
    seen = []
    for _ in range(8):
        loss, batch, segment = one_step(network, hooks)
        assert torch.isfinite(loss)
        loss.backward()
        seen.append(batch.windows.windows.num_windows)
    assert seen[0] == 4 and seen[-1] == 1 and seen == sorted(seen, reverse=True)
    assert hooks.run.teacher.is_student == (teacher == "previous")
    assert hooks._describe(hooks.run).windows == (1.0, 0.0)


def test_two_objectives_share_an_evaluation():
    """perflow and perflow_phased ask at the same point: one batch of rows, not two."""
    network, hooks = hooked({**FIXED, "objective": ["perflow", "perflow_phased"], "draws": dict(per_solve=1)})
    one_step(network, hooks)
    assert network.rows.count(2) >= 1 and network.rows[-1] == 2


def test_overlap_and_grids_train_a_student():
    for draws in (dict(overlap=0.3), dict(grids=[3, 5])):
        network, hooks = hooked({**FIXED, "draws": draws})
        assert torch.isfinite(one_step(network, hooks)[0])
