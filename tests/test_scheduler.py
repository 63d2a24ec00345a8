"""The scheduler object: the calls that Open-Sora makes, on a small network with STDiT3's call contract."""

import logging

import pytest
import torch
from mmengine import Config
from networks import PLAIN, PROMPTS, CountCalls, Reference13, batch, sizes, text_encoder, tiny_network

from opensora_perflow import PeRFlow
from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.v1 import conditions, stdit, training_call
from opensora_perflow.hosts.v1.network import Interface

FIXED = dict(mode="fixed", scale=3.0)


class Wrapper(torch.nn.Module):
    """Stands for the booster's wrapper: casts what it is given to bfloat16, as v1.2's does, and gathers late, as v1.3's."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.waited = 0

    def _force_wait_all_gather(self):
        self.waited += 1

    def forward(self, *args, **kwargs):
        def cast(v):
            return v.to(torch.bfloat16) if isinstance(v, torch.Tensor) and v.is_floating_point() else v

        return self.module(*map(cast, args), **{k: cast(v) for k, v in kwargs.items()})


def losses(scheduler, network, model_args=None, **arguments):
    x, args = batch(network)
    return scheduler.training_losses(network, x, args if model_args is None else model_args, **arguments)["loss"]


@pytest.mark.parametrize("guidance", [{}, FIXED])
def test_loss_is_one_float32_number_a_sample_with_gradients(guidance):
    network = tiny_network().train()
    loss = losses(PeRFlow(guidance=guidance), network)
    assert loss.shape == (2,) and loss.dtype == torch.float32
    loss.mean().backward()
    grads = [p.grad for p in network.parameters() if p.requires_grad]
    assert sum(g.abs().sum().item() for g in grads if g is not None) > 0


def test_the_calls_of_each_host_script():
    network = tiny_network().train()
    x, args = batch(network)
    scheduler = PeRFlow()
    mask = torch.tensor([[True] * 5, [False] + [True] * 4])
    scheduler.training_losses(network, x, {**args, "x_mask": mask}, mask=mask)  # v1.2 train.py
    scheduler.training_losses(  # v1.3 train.py
        network, x, model_args=args, mask=None, mask_index=[], x_gt=x, noise_disable_threshold=None,
        text_uncond_prob=0.1, x_noisy_ref=x,
    )  # fmt: skip
    scheduler.training_losses(network, x, model_kwargs=args)
    with torch.no_grad():  # eval_loss.py: bare model, timesteps in its dtype
        network.eval()
        loss = scheduler.training_losses(network, x, args, mask=None, t=torch.tensor([909.0, 90.0], dtype=torch.bfloat16))
    assert loss["loss"].shape == (2,)


def test_the_objective_is_zero_where_the_teachers_path_is_straight():
    # v does not depend on x or t: the student, equal to its teacher, is already straight.
    network = Reference13().eval()
    with torch.no_grad():
        network.gain.zero_()
    # One rounding of x_e - x_s, 1e-7, divided by the window's length 1/4 and squared.
    assert losses(PeRFlow(), network).max() < 1e-10


def test_the_target_is_the_teachers_window_solution():
    network, seen = tiny_network(), {}
    scheduler = PeRFlow(windows=2, teacher=dict(steps_per_window=3, solver="midpoint"), draws=PLAIN["draws"])
    x, args = batch(network)
    noise = torch.randn_like(x)

    def record(student, segment, t, frame_weights):
        seen.update(segment=segment, t=t)
        return student(segment.point(t), t).flatten(1).mean(dim=1)

    scheduler.objective = record
    scheduler.training_losses(network, x, args, noise=noise, t=torch.tensor([800.0, 300.0]))
    segment = seen["segment"]
    assert segment.t_start.tolist() == [1.0, 0.5] and segment.t_end.tolist() == [0.5, 0.0] and seen["t"].tolist() == [0.8, 0.3]
    torch.testing.assert_close(segment.x_start[0], noise[0])
    torch.testing.assert_close(segment.x_start[1], (x[1] + noise[1]) / 2)
    velocity = stdit.velocity_field(
        network, network, conditions.training_condition(Interface.of(network), args), num_timesteps=1000
    )
    state, times = segment.x_start, [(1 - i / 3) * segment.t_start + i / 3 * segment.t_end for i in range(4)]
    with torch.no_grad():
        for t, t_next in zip(times, times[1:]):  # midpoint steps by hand
            dt = (t_next - t).float()[:, None, None, None, None]
            state = state + dt * velocity(state + dt / 2 * velocity(state, t), (t + t_next) / 2)
    torch.testing.assert_close(segment.x_end, state, rtol=1e-5, atol=1e-6)


def test_frozen_frames_stay_clean_and_do_not_count():
    network, seen = tiny_network(), {}
    scheduler = PeRFlow()

    def record(student, segment, t, frame_weights):
        seen.update(segment=segment, weights=frame_weights)
        return student(segment.point(t), t).flatten(1).mean(dim=1)

    scheduler.objective = record
    x, args = batch(network)
    mask = torch.tensor([[True] * 5, [False, False] + [True] * 3])
    scheduler.training_losses(network, x, args, mask=mask)
    for state in (seen["segment"].x_start, seen["segment"].x_end):
        assert torch.equal(state[1, :, :2], x[1, :, :2]) and not torch.equal(state[1, :, 2:], x[1, :, 2:])
    assert torch.equal(seen["weights"], mask.float())


def test_nothing_the_host_passes_is_changed():
    network = tiny_network().train()
    x, args = batch(network)
    x_before, args_before = x.clone(), {key: value.clone() for key, value in args.items()}
    PeRFlow().training_losses(network, x, args, x_gt=torch.zeros_like(x), noise_disable_threshold=0.0)
    assert torch.equal(x, x_before) and set(args) == set(args_before)
    assert all(torch.equal(args[key], args_before[key]) for key in args)


def test_noise_of_half_precision_latents_is_drawn_in_float32():
    network, seen = tiny_network(), {}
    x, args = batch(network)
    scheduler = PeRFlow()
    scheduler.objective = lambda student, segment, t, frame_weights: seen.update(x=segment.x_start) or torch.zeros(2)
    scheduler.training_losses(network, x.bfloat16(), args, t=torch.tensor([1000.0, 1000.0]))  # windows start at pure noise
    assert seen["x"].dtype == torch.float32 and not torch.equal(seen["x"], seen["x"].bfloat16().float())


def test_windows_start_from_the_clean_latents_above_the_threshold():
    network, seen = tiny_network(), {}
    scheduler = PeRFlow(windows=2, **PLAIN)
    scheduler.objective = lambda student, segment, t, w: seen.update(segment=segment) or torch.zeros(2)
    x, args = batch(network)
    zero = torch.zeros_like(x)
    arguments = dict(noise=zero, x_gt=torch.ones_like(x), noise_disable_threshold=600, t=torch.tensor([900.0, 100.0]))
    scheduler.training_losses(network, x, args, **arguments)
    assert seen["segment"].x_start[0].unique().tolist() == [0.0]  # t_start = 1: pure noise
    torch.testing.assert_close(seen["segment"].x_start[1], x[1] / 2)  # starts at 500 < 600: the degraded latents
    scheduler.training_losses(network, x, args, **{**arguments, "noise_disable_threshold": 400})
    torch.testing.assert_close(seen["segment"].x_start[1], torch.full_like(x[1], 0.5))


def test_weights_are_per_timestep():
    network = tiny_network()
    t = torch.tensor([1000.0, 10.0])
    table = torch.zeros(1000)
    table[999], table[10] = 2.0, 3.0
    torch.manual_seed(1)
    plain = losses(PeRFlow(), network, t=t)
    torch.manual_seed(1)
    torch.testing.assert_close(losses(PeRFlow(), network, t=t, weights=table), plain * torch.tensor([2.0, 3.0]))


def test_the_wrapper_is_what_is_trained_and_waited_for():
    network = tiny_network().to(torch.bfloat16).train()
    wrapper = Wrapper(network)
    count = CountCalls(wrapper)
    scheduler = PeRFlow(teacher=dict(steps_per_window=3), draws=PLAIN["draws"])
    x, args = batch(network)
    loss = scheduler.training_losses(wrapper, x.bfloat16(), args)["loss"]
    assert (wrapper.waited, count.calls) == (1, 1) and loss.dtype == torch.float32
    teacher = scheduler.run.teacher.network
    assert teacher is not network and next(teacher.parameters()).dtype == torch.bfloat16
    scheduler.training_losses(wrapper, x.bfloat16(), args)
    assert wrapper.waited == 1  # the teacher is made once


def test_the_teacher_stays_what_it_was_while_the_student_trains():
    network = tiny_network().train()
    scheduler = PeRFlow()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses(scheduler, network).mean().backward()
    teacher = scheduler.run.teacher.network
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    optimizer.step()
    assert scheduler.run.teacher.network is teacher
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training


def test_sync_shows_teacher_and_student_the_same_dropped_text():
    network = Reference13().train()
    network.y_embedder.uncond_prob = 0.5
    scheduler = PeRFlow(teacher=dict(steps_per_window=1))
    for _ in range(5):
        network.seen.clear()
        x, args = batch(network, 8)
        scheduler.training_losses(network, x, args)
        student, teacher = network.seen[-1]["y"], scheduler.run.teacher.network.seen[-1]["y"]
        assert torch.equal(student, teacher)
        dropped = (student == network.y_embedder.y_embedding).all(dim=(1, 2, 3)) if student.dim() == 4 else None
        assert 0 < dropped.sum() < 8
    assert network.seen[-1]["text_uncond_prob"] == 0.0


def test_fixed_guidance_drops_no_text():
    network = Reference13().train()
    network.y_embedder.uncond_prob = 1.0
    x, args = batch(network)
    PeRFlow(guidance=FIXED).training_losses(network, x, args, text_uncond_prob=1.0)
    assert torch.equal(network.seen[-1]["y"], args["y"])


@pytest.mark.parametrize("mask_index", [None, []])
def test_text_to_video_trains_as_it_is_sampled(mask_index):
    # Upstream trains t2v with mask_index=[] (which adds the reference embedders' biases) and samples it with None.
    network = Reference13().train()
    scheduler = PeRFlow(teacher=dict(steps_per_window=1))
    losses(scheduler, network, mask_index=mask_index)
    assert network.seen[-1]["mask_index"] is None and scheduler.run.teacher.network.seen[-1]["mask_index"] is None


@pytest.mark.parametrize("index, has", [([0], True), ([], True), (None, False)])
def test_a_step_without_reference_frames_has_gradients_of_the_same_weights(index, has):
    """Each rank of v1.3 draws on its own whether its batch has some, and ZeRO reduces what gradients there are."""
    network = Reference13().train()
    x, args = batch(network)
    PeRFlow().training_losses(network, x, args, mask_index=index)["loss"].mean().backward()
    for embedder in (network.x_embedder_cond, network.x_embedder_cond_mask):
        for weight in embedder.parameters():
            assert (weight.grad is not None) == has
            assert index or weight.grad is None or not weight.grad.any()


def test_reference_frames_reach_both_networks():
    network = Reference13().train()
    scheduler = PeRFlow(
        teacher=dict(steps_per_window=1), x_cond_weight=0.0, guidance=dict(mode="fixed", scale=2.0, image_scale=5.0)
    )
    x, args = batch(network)
    noisy = x + 1
    scheduler.training_losses(network, x, args, mask_index=[0, 2], x_noisy_ref=noisy)
    student, teacher = network.seen[-1], scheduler.run.teacher.network.seen[-1]
    assert student["mask_index"] == teacher["mask_index"] == [0, 2]
    assert torch.equal(student["cond"][:, :, 0], noisy[:, :, 0]) and student["cond"][:, :, 1].abs().sum() == 0
    assert len(student["x"]) == 2 and len(teacher["x"]) == 6


def test_windows_are_warped_per_sample_with_the_hosts_transform():
    network, seen = tiny_network(), {}
    scheduler = PeRFlow(use_timestep_transform=True, transform="v1.2")
    scheduler.objective = lambda student, segment, t, w: seen.update(segment=segment, t=t) or torch.zeros(2)
    x, args = batch(network)
    args["num_frames"] = torch.tensor([17.0, 102.0])
    args["height"] = args["width"] = torch.tensor([512.0, 360.0])
    scheduler.training_losses(network, x, args)
    from opensora_perflow.conventions import shift_time, unshift_time
    from opensora_perflow.hosts.v1.timestep_transform import shift_ratio

    ratio = shift_ratio(args, "v1.2")
    edges = torch.tensor(scheduler.recipe.windows.edges, dtype=torch.float64)
    for i in range(2):
        warped = shift_time(edges, ratio[i])
        assert seen["segment"].t_start[i] in warped and seen["segment"].t_end[i] in warped
        assert seen["segment"].t_end[i] < seen["t"][i] <= seen["segment"].t_start[i]
    assert (unshift_time(seen["t"], ratio) >= 0).all()


@pytest.mark.parametrize("transform, warps", [("v1.2", False), ("v1.3", True)])
def test_transform_scale_warps_windows_under_v1_3_alone(transform, warps):
    """As upstream when it samples; v1.2 warps drawn times by it, whose distribution has no effect here."""
    network, seen = tiny_network(), {}

    def run(scale):
        torch.manual_seed(3)
        warp = dict(use_timestep_transform=True, transform=transform, transform_scale=scale)
        scheduler = PeRFlow(**warp, windows=1000)
        scheduler.objective = lambda student, segment, t, w: seen.update(segment=segment, t=t) or torch.zeros(2)
        x, args = batch(network)
        scheduler.training_losses(network, x, args)
        return seen["t"], scheduler.warped(args, x).times(scheduler.grid)

    (t1, grid1), (t2, grid2) = run(1.0), run(3.0)
    assert torch.equal(t1, t2) == torch.equal(grid1, grid2) == (not warps)


@pytest.mark.parametrize(
    "transform, keys",
    [
        ("v1.2", dict(sample_method="logit-normal")),
        ("v1.2", dict(sample_method="logit-normal", loc=1.5, scale=0.3)),
        ("v1.2", dict(transform_scale=3.0)),
        ("v1.3", dict(uniform_over_threshold=0.0)),
        ("v1.3", dict(sample_method="logit-normal", loc=-2.0, uniform_over_threshold=0.6)),
    ],
)
def test_the_hosts_keys_for_drawing_times_change_nothing(transform, keys):
    def drawn(seed, **settings):
        network = tiny_network().train()
        scheduler = PeRFlow(
            windows=[1, 0.9, 0.4, 0], use_timestep_transform=True, transform=transform, draws=dict(seed=seed), **settings
        )
        return torch.stack([losses(scheduler, network).detach() for _ in range(3)])

    plain = drawn(7)
    assert torch.equal(drawn(7, **keys), plain) and not torch.equal(drawn(8), plain)


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            dict(sample_method="logit-normal", loc=1.0, scale=0.5, uniform_over_threshold=0.6),
            "sample_method, loc, scale, uniform_over_threshold have no effect",
        ),
        (dict(sample_method="logit-normal"), "sample_method has no effect"),
        (dict(sample_method="uniform", loc=0.0, scale=1.0, uniform_over_threshold=None), None),
        ({}, None),
    ],
)
def test_the_log_says_once_which_keys_have_no_effect(keys, message, caplog):
    network = tiny_network()
    with caplog.at_level(logging.INFO, logger="opensora_perflow"):
        scheduler = PeRFlow(**keys)
        sampled(scheduler, network)
        assert "no effect" not in caplog.text  # they are of training
        for _ in range(2):
            losses(scheduler, network)
    said = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert [line.split(": ")[1] for line in said] == ([] if message is None else [message])


def test_another_named_teacher_is_refused_in_the_middle_of_a_run(tmp_path):
    for name, seed in ("one", 5), ("other", 6):
        write_state_dict(tmp_path / f"{name}.safetensors", tiny_network(seed).state_dict())
    one, other = (dict(from_pretrained=str(tmp_path / f"{name}.safetensors")) for name in ("one", "other"))
    scheduler, network = PeRFlow(teacher=one), tiny_network(7)
    scheduler.__init__(teacher=other)
    scheduler.__init__(teacher=one)  # nothing was taught yet
    losses(scheduler, network)
    before = scheduler.run.teacher, scheduler.recipe
    with pytest.raises(ValueError, match="taught by weights from .*one.safetensors.*other.safetensors' would change that"):
        scheduler.__init__(teacher=other)
    assert before == (scheduler.run.teacher, scheduler.recipe)
    scheduler.__init__(teacher=dict(one, steps_per_window=3))
    assert scheduler.run.teacher is before[0] and scheduler.run.recipe.teacher_steps == 3
    scheduler = PeRFlow()
    losses(scheduler, network)
    with pytest.raises(ValueError, match="taught by a copy of the student's weights at this run's first step"):
        scheduler.__init__(teacher=one)


def test_a_resumed_run_without_a_teacher_stops_before_it_trains():
    network = tiny_network().train()

    def main():
        cfg = Config(dict(scheduler=dict(type="perflow"), model=dict(from_pretrained="base"), load="outputs/000/epoch0"))
        return losses(PeRFlow(), network), cfg

    with pytest.raises(ValueError, match=r'resumes from .*teacher=dict\(from_pretrained="base"\)'):
        main()


def test_a_named_teacher_is_used(tmp_path):
    source = tiny_network(5)
    write_state_dict(tmp_path / "t.safetensors", source.state_dict())
    scheduler, network = PeRFlow(teacher=dict(from_pretrained=str(tmp_path / "t.safetensors"))), tiny_network(6)
    losses(scheduler, network)
    weight = scheduler.run.teacher.network.final_layer.linear.weight
    assert torch.equal(weight, source.final_layer.linear.weight) and not torch.equal(weight, network.final_layer.linear.weight)


def test_a_copied_teacher_that_returns_nan_is_named():
    """Both networks are broken, and with diffused starts the teacher comes first; test_blame.py has the other places."""
    network = tiny_network()
    with torch.no_grad():
        network.final_layer.linear.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="the teacher .*first step.* returned NaN or infinity for 2 of 2 samples"):
        losses(PeRFlow(draws=dict(starts="diffused")), network)


@pytest.mark.parametrize(
    "objective",
    [
        "perflow_direction",
        "perflow_phased",
        "perflow_consistency",
        dict(type="perflow_consistency", target="solution"),
        [dict(type="perflow"), dict(type="perflow_direction", weight=0.1)],
        ["perflow", dict(type="perflow_consistency", weight=0.1)],
    ],
)
def test_every_objective_trains_through_the_scheduler(objective):
    network = tiny_network().train()
    scheduler = PeRFlow(objective=objective, guidance=FIXED, teacher=dict(steps_per_window=2))
    losses(scheduler, network)  # makes the teacher
    with torch.no_grad():
        network.final_layer.linear.bias += 0.5
    mask = torch.tensor([[True] * 5, [False, False] + [True] * 3])
    loss = losses(scheduler, network, mask=mask)
    assert loss.shape == (2,) and loss.dtype == torch.float32 and (loss > 0).all()
    loss.mean().backward()
    assert network.final_layer.linear.bias.grad.abs().sum() > 0


# --- draws ---


def recorded(scheduler):
    """Puts an objective in place that keeps every segment and time it is called with, and depends on the student."""
    seen = []

    def record(student, segment, t, frame_weights):
        seen.append((segment, t))
        return student(segment.point(t), t).flatten(1).mean(dim=1)

    scheduler.objective = record
    return seen


@pytest.mark.parametrize("per_solve", [1, 3])
def test_one_solution_of_the_teacher_feeds_several_times(per_solve):
    network = tiny_network()
    draws, teacher = dict(PLAIN["draws"], per_solve=per_solve), dict(PLAIN["teacher"], steps_per_window=2)
    scheduler = PeRFlow(draws=draws, teacher=teacher)
    losses(scheduler, network)
    student, teacher = CountCalls(network), CountCalls(scheduler.run.teacher.network)
    seen = recorded(scheduler)
    losses(scheduler, network)
    assert (student.calls, student.samples, teacher.calls) == (per_solve, 2 * per_solve, 2)
    assert len({id(segment) for segment, _ in seen}) == 1
    segment, times = seen[0][0], torch.stack([t for _, t in seen])
    assert ((times > segment.t_end) & (times <= segment.t_start)).all() and len(times.unique()) == 2 * per_solve


def test_the_loss_of_several_times_is_their_weighted_mean():
    network, values = tiny_network(), iter([1.0, 5.0, 9.0])
    scheduler = PeRFlow(draws=dict(per_solve=3, edge_mass=0.5))
    scheduler.objective = lambda student, segment, t, w: torch.full((2,), next(values))
    torch.testing.assert_close(losses(scheduler, network), torch.full((2,), 0.5 * 1 + 0.25 * (5 + 9)))


@pytest.mark.parametrize("per_solve", [1, 2])
def test_a_given_time_is_the_only_one(per_solve):
    scheduler = PeRFlow(draws=dict(per_solve=per_solve, edge_mass=0.5))
    seen = recorded(scheduler)
    losses(scheduler, tiny_network(), t=torch.tensor([800.0, 300.0]))
    assert [t.tolist() for _, t in seen] == [[0.8, 0.3]]


def test_the_time_that_an_old_train_script_drew_is_one_of_several():
    network = tiny_network()
    scheduler = PeRFlow(draws=dict(per_solve=3, edge_mass=0.5))
    seen, (x, args) = recorded(scheduler), batch(network)
    scheduler.training_losses(network, x, torch.tensor([800, 300]), args)
    (segment, edge), _, (_, drawn) = seen
    assert torch.equal(edge, segment.t_start) and edge.tolist() == [1.0, 0.5]
    assert drawn.tolist() == [0.8, 0.3]
    scheduler = PeRFlow(draws=dict(edge_mass=1e-9))
    seen = recorded(scheduler)
    scheduler.training_losses(network, x, torch.tensor([800, 300]), args)
    assert [t.tolist() for _, t in seen] == [[0.8, 0.3]]  # one, if not asked for more


def test_edge_times_are_the_warped_edges_themselves():
    network = tiny_network()
    scheduler = PeRFlow(draws=dict(edge_mass=1.0), use_timestep_transform=True, transform="v1.2")
    seen = recorded(scheduler)
    losses(scheduler, network)
    segment, t = seen[0]
    assert torch.equal(t, segment.t_start)


@pytest.mark.parametrize("settings", [{}, dict(draws=dict(edge_mass=1)), dict(draws=dict(grids=[3]))])
def test_discrete_timesteps_are_drawn_whole_at_the_edge_too(settings):
    scheduler = PeRFlow(windows=7, use_discrete_timesteps=True, teacher=dict(steps_per_window=1), **settings)
    seen, network = recorded(scheduler), Reference13().eval()
    for _ in range(5):
        x, args = batch(network, 8)
        scheduler.training_losses(network, x, args)
    times = torch.stack([t for _, t in seen])
    starts, ends = (torch.stack([getattr(segment, name) for segment, _ in seen]) for name in ("t_start", "t_end"))
    assert len(times) == 5 and torch.equal(times, (times * 1000).round() / 1000)
    # 40 draws: fewer than 15 at the edge, where 30 are expected, in one of 10^6 runs; none inside in one of 10^5.
    at_edge = int((times == starts).sum())
    assert ((times <= starts) & (times >= ends)).all()
    assert at_edge == 40 if settings.get("draws", {}).get("edge_mass") == 1 else 15 <= at_edge < 40


@pytest.mark.parametrize("guidance", [{}, FIXED])
def test_a_student_start_is_what_its_own_sampler_reaches(guidance):
    network = tiny_network()
    settings = dict(windows=4, guidance=guidance, cfg_scale=2.0, use_timestep_transform=True, transform="v1.2")
    scheduler = PeRFlow(draws=dict(starts="student"), **settings)
    seen = recorded(scheduler)
    x, args = batch(network)
    noise = torch.randn_like(x)
    scheduler.training_losses(network, x, args, noise=noise, t=torch.tensor([1000.0, 10.0]))
    segment = seen[0][0]
    assert torch.equal(segment.x_start[0], noise[0]) and segment.t_start[0] == 1  # window 0 starts at the noise
    states = []
    network.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0][1]))
    sampled(PeRFlow(**settings), network, noise, additional_args={k: v for k, v in args.items() if k not in ("y", "mask")})
    # The fourth call of the sampler starts at the last window's edge. Same arithmetic, in float32.
    torch.testing.assert_close(segment.x_start[1], states[3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frames", [None, [0]])
@pytest.mark.parametrize(
    "keys",
    [
        dict(use_oscillation_guidance=True, force_num=1),
        dict(scale_image_weight=True),
        dict(scale_image_weight=True, initial_image_scale=2.0, use_oscillation_guidance=True, force_num=0),
        dict(cfg_scale=[4.0, 3.0, 2.0, 1.0], use_flaw_fix=True),
        dict(cfg_scale=[4.0, 3.0, 2.0, 1.0], scale_image_weight=True),
        dict(guidance=FIXED, use_oscillation_guidance=True, force_num=0, scale_image_weight=True),
    ],
)
def test_student_starts_are_the_samplers_states_under_every_kind_of_guidance(keys, frames):
    network = Reference13().eval()
    settings = {**dict(cfg_scale=4.0, use_timestep_transform=True, transform="v1.3"), **keys}
    scheduler = PeRFlow(**settings)
    seen, (x, args) = recorded(scheduler), batch(network, 4)
    noise, t = torch.randn_like(x), torch.tensor([1000.0, 400.0, 150.0, 10.0])
    scheduler.training_losses(network, x, args, noise=noise, t=t, mask_index=frames)
    edges = scheduler.warped(args, x).edges
    assert torch.equal(seen[0][0].t_start, edges[:-1].diagonal())  # a sample in each window
    network.seen.clear()
    reference = {} if frames is None else dict(z_cond=x, mask_index=frames)
    sampled(PeRFlow(**settings), network, noise, prompts=PROMPTS * 2, additional_args=sizes(4), **reference)
    states = torch.stack([call["x"][row] for row, call in enumerate(network.seen)])
    torch.testing.assert_close(seen[0][0].x_start, states, rtol=1e-5, atol=1e-5)


def test_samples_of_other_grids_have_the_image_weights_of_their_own_number_of_steps():
    network = Reference13().eval()
    settings = dict(cfg_scale=4.0, scale_image_weight=True)
    scheduler = PeRFlow(windows=4, draws=dict(grids=[3], seed=0), **settings)
    seen, (x, args) = recorded(scheduler), batch(network, 8)
    noise = torch.randn_like(x)
    scheduler.training_losses(network, x, args, noise=noise, t=torch.full((8,), 10.0), mask_index=[0])
    starts, checked = seen[0][0].t_start, set()
    for steps in (3, 4):
        network.seen.clear()
        sampled(
            PeRFlow(windows=steps, **settings), network, noise, prompts=PROMPTS * 4, additional_args=sizes(8),
            z_cond=x, mask_index=[0],
        )  # fmt: skip
        rows = (starts - 1 / steps).abs() < 1e-9
        checked |= {steps} if rows.any() else set()
        torch.testing.assert_close(seen[0][0].x_start[rows], network.seen[-1]["x"][:8][rows], rtol=1e-5, atol=1e-5)
    assert checked == {3, 4}


def test_student_starts_use_no_data():
    network, results = tiny_network(), []
    for x in (torch.zeros(2, 4, 5, 4, 4), torch.randn(2, 4, 5, 4, 4)):
        args = batch(network)[1]
        torch.manual_seed(4)
        results.append(PeRFlow(draws=dict(starts="student")).training_losses(network, x, args)["loss"])
    assert torch.equal(*results)


def test_student_starts_keep_frozen_frames_and_references():
    network = tiny_network()
    scheduler = PeRFlow(draws=dict(starts="student"))
    seen = recorded(scheduler)
    x, args = batch(network)
    mask = torch.tensor([[True] * 5, [False, False] + [True] * 3])
    scheduler.training_losses(network, x, args, mask=mask, t=torch.tensor([100.0, 100.0]))
    for state in (seen[0][0].x_start, seen[0][0].x_end):
        assert torch.equal(state[1, :, :2], x[1, :, :2]) and not torch.equal(state[1, :, 2:], x[1, :, 2:])
    network = Reference13().train()
    scheduler = PeRFlow(draws=dict(starts="student"), guidance=FIXED)
    scheduler.training_losses(network, x, batch(network)[1], mask_index=[0], t=torch.tensor([100.0, 100.0]))
    assert len(network.seen) == 4 and all(torch.equal(call["cond"][:, :, 0], x[:, :, 0]) for call in network.seen)


def test_a_rollout_goes_through_the_wrapper_and_leaves_no_gradient():
    network = tiny_network().to(torch.bfloat16).train()
    wrapper = Wrapper(network)
    graphs = []
    wrapper.register_forward_hook(lambda module, inputs, output: graphs.append(output.requires_grad))
    x, args = batch(network)
    scheduler = PeRFlow(draws=dict(starts="student"), windows=3, teacher=dict(steps_per_window=1))
    loss = scheduler.training_losses(wrapper, x.bfloat16(), args, t=torch.tensor([900.0, 100.0]))["loss"]
    loss.mean().backward()
    assert graphs == [False, False, True]  # two windows above the last one, then the loss


@pytest.mark.parametrize("settings", [{}, FIXED])
@pytest.mark.parametrize("frames", [None, [0]])
def test_samples_that_have_arrived_leave_the_roll_out(settings, frames):
    """The same states as with the whole batch, up to the order of float32 sums in a smaller batch; fewer evaluations."""
    network = Reference13().train()
    x, args = batch(network, 4)
    t = torch.tensor([1000.0, 100.0, 600.0, 400.0])  # windows 0, 3, 1, 2
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 0] = mask[3, 1] = False
    starts, rows = [], []
    for projected in (False, True):  # what packed text looks like: its samples cannot be told apart
        torch.manual_seed(0)
        scheduler = PeRFlow(guidance=settings, watch=None, draws=dict(seed=1))
        seen = recorded(scheduler)
        network.seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            if projected:
                patch.setattr(training_call, "separable", lambda *_: False)
            scheduler.training_losses(network, x, args, t=t, mask=mask, mask_index=frames, noise=torch.ones_like(x))
        starts.append(seen[0][0].x_start)
        rows.append([len(call["x"]) for call in network.seen])
    torch.testing.assert_close(*starts, rtol=1e-6, atol=1e-6)
    branches = 1 if settings else 3 if frames else 2
    assert rows == [[3 * branches, 2 * branches, branches, 4], [4 * branches] * 3 + [4]]


def test_a_roll_out_without_the_arrived_tells_each_sample_its_own_scale(monkeypatch):
    network = tiny_network().train()
    x, args = batch(network, 4)
    t, losses = torch.tensor([1000.0, 100.0, 600.0, 400.0]), []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(training_call, "separable", lambda *_: False)
        scheduler = PeRFlow(guidance=dict(mode="range", scale=(1.0, 9.0)), watch=None, draws=dict(seed=1))
        losses.append(scheduler.training_losses(network, x, args, t=t, noise=torch.ones_like(x))["loss"])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


# --- sampling ---


def sampled(scheduler, network, z=None, **arguments):
    z = torch.randn(2, 4, 5, 4, 4) if z is None else z
    defaults = dict(prompts=PROMPTS, device="cpu", additional_args=sizes(2), progress=False)
    with torch.no_grad():
        return scheduler.sample(network, text_encoder(network), z, **{**defaults, **arguments})


def test_objectives_show_the_student_frozen_frames_as_they_are():
    """One that takes a step with the student's own velocity has them stand still, as they do when sampling."""

    def stepping(student, segment, t, frame_weights):
        dt = (segment.t_end - segment.t_start) / 2
        v = student(segment.x_start, segment.t_start)
        x = segment.x_start + dt.float()[:, None, None, None, None] * v
        return (student(x, segment.t_start + dt) - v).square().flatten(1).mean(dim=1)

    network = tiny_network()
    x, args = batch(network)
    scheduler = PeRFlow(windows=4, draws=dict(starts="diffused", edge_mass=0.0))
    scheduler.objective = stepping
    mask = torch.tensor([[False] + [True] * 4] * 2)
    seen, forward = [], network.forward
    network.forward = lambda x, *inputs, **named: seen.append(x) or forward(x, *inputs, **named)
    scheduler.training_losses(network, x, args, mask=mask)["loss"].sum().backward()
    seen = seen[-4:]  # after the teacher's, which is a copy: two for each of the two times
    assert all(torch.equal(state[:, :, 0], x[:, :, 0]) for state in seen)
    assert not torch.equal(seen[0][:, :, 1:], seen[1][:, :, 1:])


@pytest.mark.parametrize("guidance, evaluations", [({}, 2), (FIXED, 1)])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_network_evaluations(guidance, evaluations, steps):
    network = tiny_network()
    count = CountCalls(network)
    out = sampled(PeRFlow(guidance=guidance, num_sampling_steps=steps), network)
    assert (count.calls, count.samples) == (steps, 2 * steps * evaluations) and out.dtype == torch.float32


@pytest.mark.parametrize("ratio, evaluations", [(0.6, 5), (0.5, 4)])
def test_an_edit_ratio_between_two_grid_points_costs_an_evaluation(ratio, evaluations):
    network = tiny_network()
    count = CountCalls(network)
    sampled(PeRFlow(guidance=FIXED), network, mask=torch.tensor([[ratio] * 2 + [1.0] * 3] * 2))
    assert count.calls == evaluations


def test_an_edit_ratio_is_a_warped_time():
    # As upstream compares it: mask * num_timesteps with the transformed timestep.
    network = Reference13().eval()
    mask = torch.tensor([[0.95, 1.0, 1.0, 1.0, 1.0]] * 2)
    sampled(PeRFlow(guidance=FIXED, use_timestep_transform=True, transform="v1.2"), network, mask=mask)
    times = [call["timestep"][0].item() for call in network.seen]
    joined = next(i for i, call in enumerate(network.seen) if call["x_mask"][0, 0])
    assert len(times) == 5 and times[joined] == pytest.approx(950.0, abs=1e-3)  # float32 of 0.95, in timesteps
    assert times == sorted(times, reverse=True)


def test_joining_gives_reference_frames_back_and_changes_only_what_follows():
    network, z = tiny_network(), torch.randn(2, 4, 5, 4, 4)
    mask = torch.tensor([[0.0] * 2 + [1.0] * 3, [1.0] * 5])
    count = CountCalls(network)
    torch.manual_seed(0)
    out = sampled(PeRFlow(guidance=FIXED, long_video=dict(edit=0.5, frames=1)), network, z, mask=mask)
    assert count.calls == 4 and torch.equal(out[0, :, :2], z[0, :, :2])
    torch.manual_seed(0)
    edited = sampled(PeRFlow(guidance=FIXED), network, z, mask=mask.masked_fill(mask == 0, 0.5))
    torch.testing.assert_close(out[0, :, 2], edited[0, :, 2] + 0.5 * (z[0, :, 1] - edited[0, :, 1]))
    torch.testing.assert_close(out[0, :, 3:], edited[0, :, 3:], rtol=0, atol=0)
    torch.testing.assert_close(out[1], edited[1], rtol=0, atol=0)  # a clip without reference frames


def test_joining_without_an_edit_is_upstreams_joint():
    network, z = tiny_network(), torch.randn(2, 4, 5, 4, 4)
    mask = torch.tensor([[0.0] * 2 + [1.0] * 3] * 2)
    results = []
    for joint in (None, dict(edit=0.0, frames=3)):
        torch.manual_seed(0)
        results.append(sampled(PeRFlow(long_video=joint), network, z, mask=mask))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_steps_default_to_one_a_window():
    network = tiny_network()
    count = CountCalls(network)
    sampled(PeRFlow(windows=3, guidance=FIXED), network)
    assert count.calls == 3


def test_half_precision_noise_is_integrated_in_float32():
    network, z = tiny_network(), torch.randn(2, 4, 5, 4, 4).bfloat16()
    torch.testing.assert_close(sampled(PeRFlow(), network, z), sampled(PeRFlow(), network, z.float()), rtol=0, atol=0)


def test_sampling_changes_neither_arguments_nor_noise():
    network, z, args = tiny_network(), torch.randn(2, 4, 5, 4, 4), sizes(2)
    before = z.clone()
    sampled(PeRFlow(use_timestep_transform=True), network, z, additional_args=args, mask=torch.tensor([[0.0] + [1.0] * 4] * 2))
    assert torch.equal(z, before) and set(args) == set(sizes(2))


def test_sampling_works_in_inference_mode():
    network, scheduler = tiny_network(), PeRFlow()
    with torch.inference_mode():
        out = sampled(scheduler, network)
    assert torch.isfinite(out).all()
    losses(scheduler, network.train()).mean().backward()  # nothing of inference mode is left behind


def test_guidance_scale_argument_wins_over_the_config():
    network, z = tiny_network(), torch.randn(2, 4, 5, 4, 4)
    one = sampled(PeRFlow(cfg_scale=2.0), network, z)
    torch.testing.assert_close(sampled(PeRFlow(cfg_scale=9.0), network, z, guidance_scale=2.0), one, rtol=0, atol=0)
    assert not torch.allclose(sampled(PeRFlow(cfg_scale=9.0), network, z), one)


def test_folded_guidance_says_that_it_ignores_a_scale(caplog):
    with caplog.at_level(logging.WARNING):
        scheduler = PeRFlow(guidance=FIXED)
        for _ in range(2):
            sampled(scheduler, tiny_network(), guidance_scale=5.0)
    assert [r.message for r in caplog.records if "no effect" in r.message] == [
        "guidance is folded into the weights: guidance_scale and negative prompts have no effect"
    ]


@pytest.mark.parametrize("asked, warns", [(5.0, True), (2.0, False), (None, False)])
def test_folded_guidance_says_that_it_ignores_the_image_scale(caplog, asked, warns):
    scheduler = PeRFlow(guidance=dict(FIXED, image_scale=2.0))
    with caplog.at_level(logging.WARNING):
        sampled(scheduler, Reference13().eval(), mask_index=[0], z_cond=torch.randn(2, 4, 5, 4, 4), image_cfg_scale=asked)
    message = "guidance by reference frames is folded into the weights, with scale 2: image_cfg_scale=5 has no effect"
    assert [r.message for r in caplog.records if "no effect" in r.message] == [message] * warns


def test_reference_frames_need_their_latents():
    with pytest.raises(ValueError, match=r"mask_index \[0\] names reference frames, but z_cond is None"):
        sampled(PeRFlow(), Reference13().eval(), mask_index=[0])


def test_image_conditioning_makes_three_branches_or_one():
    for guidance, rows in ({}, 6), (FIXED, 2):
        network = Reference13().eval()
        sampled(PeRFlow(guidance=guidance), network, mask_index=[0], z_cond=torch.randn(2, 4, 5, 4, 4), use_sdedit=True)
        assert {len(call["x"]) for call in network.seen} == {rows}
        assert all(len(call["y_null"]) == rows for call in network.seen)


def test_reference_frames_reach_a_half_precision_network_in_its_precision():
    # inference_i2v.py and gradio run the network in bfloat16; v1.3 casts x and y inside (stdit3.py:441), but not cond.
    network = Reference13().to(torch.bfloat16).eval()
    sampled(PeRFlow(), network, mask_index=[0], z_cond=torch.randn(2, 4, 5, 4, 4, dtype=torch.bfloat16), use_sdedit=True)
    for name in ("cond", "cond_mask", "y_null"):
        assert {call[name].dtype for call in network.seen} == {torch.bfloat16}, name


def test_discrete_timesteps_are_whole():
    network = Reference13().eval()
    sampled(PeRFlow(windows=7, use_discrete_timesteps=True), network)
    times = torch.stack([call["timestep"][0] for call in network.seen])
    assert torch.equal(times, times.round()) and times[1] == 857


class Still(torch.nn.Module):
    """Leaves every state where it is: for steps of so many samples that only what they draw can be looked at."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, timestep, y):
        return torch.zeros_like(x)


def step_of(scheduler, count, t=None, drawn_by_host=False):
    """What one training step of so many samples draws: (their segments, times [n, B], window indices [B])."""
    seen, x = [], torch.zeros(count, 1, 1, 1, 1)
    args = {"y": torch.zeros(count, 1, 1, 1), **sizes(count, num_frames=51, side=512)}
    scheduler.objective = lambda student, segment, t, weights: seen.append((segment, t)) or torch.zeros(count)
    if drawn_by_host:
        scheduler.training_losses(Still(), x, t, args)
    else:
        scheduler.training_losses(Still(), x, args, t=t)
    segment = seen[0][0]
    return segment, torch.stack([t for _, t in seen]), scheduler.warped(args, x).lookup(segment.t_start)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(windows=[1, 0.9, 0.5, 0.2, 0]),
        dict(windows=[1, 0.9, 0.5, 0.2, 0], sample_method="logit-normal", loc=1.0, scale=0.5),
        dict(windows=[1, 0.9, 0.5, 0.2, 0], use_timestep_transform=False),
        dict(transform="v1.3", transform_scale=2.0),
    ],
)
def test_windows_are_drawn_alike(settings):
    scheduler = PeRFlow(**{**dict(windows=4, use_timestep_transform=True, transform="v1.2"), **settings}, draws=dict(seed=0))
    segment, times, window_idx = step_of(scheduler, 8000)
    shares = window_idx.bincount(minlength=4).double() / 8000
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.02)  # standard deviation .005
    assert ((segment.t_end <= times) & (times <= segment.t_start)).all()


def test_inside_a_window_times_are_even():
    """The first window's place decides nothing: as many times in each quarter of a wide window and of a narrow one."""
    scheduler = PeRFlow(windows=[1, 0.5, 0.4, 0], draws=dict(edge_mass=0.0, per_solve=2, seed=0))
    segment, times, window_idx = step_of(scheduler, 6000)
    for k in (0, 1):
        in_window = window_idx == k
        start, end = segment.t_start[in_window], segment.t_end[in_window]
        assert len(times) == 2
        for t in times:  # the one that chose the window, and one more
            place = (t[in_window] - end) / (start - end)
            quarters = (place * 4).clamp(max=3.999).long().bincount(minlength=4).double() / len(place)
            assert quarters.tolist() == pytest.approx([0.25] * 4, abs=0.05)  # 2000 draws: standard deviation .01


def test_times_that_a_host_draws_fill_unequal_windows_alike():
    """train.py of 1.0 and 1.1 draws whole timesteps evenly; one that is asked for by name stays where it is."""
    scheduler = PeRFlow(windows=[1, 0.9, 0.8, 0.3, 0])
    t = torch.arange(4000) % 1000 + 1.0
    *_, window_idx = step_of(scheduler, 4000, t, drawn_by_host=True)
    assert window_idx.bincount().tolist() == [1000] * 4
    _, times, _ = step_of(scheduler, 4000, t)
    assert torch.equal(times, t.double()[None] / 1000)


def test_whole_timesteps_that_are_an_edge_begin_its_window():
    scheduler = PeRFlow(windows=5, use_discrete_timesteps=True, use_timestep_transform=True, transform="v1.2")
    segment, (times,), _ = step_of(scheduler, 20000)
    assert ((times > segment.t_end) | (times == 0)).all()  # a window's clean edge is the next one's, but for the last


def test_each_step_in_whole_timesteps_has_its_windows_scale():
    settings = dict(windows=3, use_discrete_timesteps=True, num_sampling_steps=3, cfg_scale=[9.0, 5.0, 1.0])
    assert PeRFlow(sampling_grid="uniform", **settings).step_scales() == [9.0, 5.0, 1.0]
