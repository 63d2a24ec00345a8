"""The scheduler on epsilon networks, with STDiT2's contract: the calls of Open-Sora 1.0 and 1.1, and iddpm's keys."""

from contextlib import nullcontext

import pytest
import torch
from networks import PLAIN, PROMPTS, Epsilon, batch, sizes, text_encoder, tiny_network

from opensora_perflow import PeRFlow
from opensora_perflow.hosts.v1 import iddpm
from opensora_perflow.method.ddpm import DDPM

PATH = DDPM.from_schedule()
INDEX = torch.tensor([874, 100])  # int64, as 1.0's and 1.1's train.py draw them


def epsilon_network():
    return Epsilon(lambda timestep: PATH.sigma(PATH.from_timestep(timestep)))


def recorded(scheduler):
    seen = {}

    def record(student, segment, t, frame_weights):
        seen.update(segment=segment, t=t, weights=frame_weights, student=student)
        return student(segment.point(t), t).flatten(1).mean(dim=1)

    scheduler.objective = record
    return seen


# --- training ---


def test_the_calls_of_1_0_and_1_1():
    network = epsilon_network().train()
    x, args = batch(network)
    scheduler = PeRFlow(timestep_respacing="")
    loss = scheduler.training_losses(network, x, INDEX, {key: args[key] for key in ("y", "mask")})["loss"]  # v1.0
    assert loss.shape == (2,) and loss.dtype == torch.float32
    mask = torch.tensor([[True] * 5, [False] + [True] * 4])
    loss = scheduler.training_losses(network, x, INDEX, {**args, "x_mask": mask}, mask=mask)["loss"]  # v1.1
    loss.mean().backward()
    assert network.gain.grad is not None and isinstance(scheduler.num_timesteps, int) and scheduler.num_timesteps == 1000
    assert torch.equal(network.seen[-1]["x_mask"], mask)


def test_the_calls_of_1_2_and_1_3():
    """No t: train.py of 1.2 and 1.3 lets the scheduler draw it; eval_loss passes floats in the training dtype."""
    network = epsilon_network().train()
    x, args = batch(network)
    scheduler = PeRFlow(timestep_respacing="")
    scheduler.training_losses(network, x, args, mask=None)
    scheduler.training_losses(network, x, model_args=args, mask=None, mask_index=[], x_gt=x, text_uncond_prob=0.1)
    loss = scheduler.training_losses(network, x, args, t=torch.tensor([909.0, 90.0], dtype=torch.bfloat16))["loss"]
    assert torch.isfinite(loss).all()


def test_windows_start_on_the_diffusion_path_and_end_where_ddim_does():
    network = epsilon_network()
    teacher = dict(PLAIN["teacher"], steps_per_window=3)
    scheduler = PeRFlow(path="ddpm", windows=[1, 0.6, 0.2, 0], teacher=teacher, draws=PLAIN["draws"])
    seen = recorded(scheduler)
    x, args = batch(network)
    args["y"] = torch.zeros_like(args["y"])
    noise = torch.randn_like(x)
    scheduler.training_losses(network, x, args, noise=noise, t=INDEX)
    segment = seen["segment"]
    assert seen["t"].tolist() == [0.875, 0.101]
    assert segment.t_start.tolist() == [1.0, 0.2] and segment.t_end.tolist() == [0.6, 0.0]
    state = PATH.add_noise(x, noise, segment.t_start)
    torch.testing.assert_close(segment.x_start, state)
    for i in range(3):  # DDIM by hand on each sample's own times, with epsilon = sigma x
        t, t_next = (segment.t_start + (segment.t_end - segment.t_start) * j / 3 for j in (i, i + 1))
        a, a_next, s, s_next = (f(v) for f in (PATH.alpha, PATH.sigma) for v in (t, t_next))
        state = state * (a_next / a * (1 - s * s) + s_next * s).float()[:, None, None, None, None]
    # The clock runs to 157 on the way down: some hundred float32 roundings of 6e-8.
    torch.testing.assert_close(segment.x_end, state, rtol=1e-4, atol=1e-5)


def test_the_loss_is_in_units_of_the_networks_output():
    """The teacher's epsilon shifted by a constant c is c^2 away in every window, noise matching's own figure."""
    network = epsilon_network()
    x, args = batch(network)
    settings = dict(path="ddpm", windows=1000, learn_sigma=False)
    scheduler = PeRFlow(**settings, teacher=dict(PLAIN["teacher"], steps_per_window=1), draws=PLAIN["draws"])
    args["y"] = torch.zeros_like(args["y"])
    scheduler.training_losses(network, x, INDEX, args)
    bias = 0.3
    student = Epsilon(network.sigma)
    student.load_state_dict(network.state_dict())
    student.register_forward_hook(lambda module, inputs, output: output + bias)
    loss = scheduler.training_losses(student, x, args, t=torch.tensor([874, 100]))["loss"]
    # windows of one index: the drawn index is the window's start, so the student's ddim_eps is the teacher's epsilon
    torch.testing.assert_close(loss, torch.full((2,), bias**2), rtol=1e-2, atol=0)


def test_frozen_frames_have_upstreams_noise_of_index_zero():
    network, scheduler = epsilon_network(), PeRFlow(path="ddpm")
    seen = recorded(scheduler)
    x, args = batch(network)
    noise, mask = torch.randn_like(x), torch.tensor([[True] * 5, [False, False] + [True] * 3])
    scheduler.training_losses(network, x, args, noise=noise, t=INDEX, mask=mask)
    still = PATH.add_noise(x, noise, torch.full((2,), 0.001, dtype=torch.float64))
    for state in (seen["segment"].x_start, seen["segment"].x_end):
        assert torch.equal(state[1, :, :2], still[1, :, :2]) and not torch.equal(state[1, :, 2:], still[1, :, 2:])


def test_the_variance_half_is_kept_as_the_teachers():
    network = epsilon_network()
    x, args = batch(network)
    losses = {}
    for kept in (False, True):
        scheduler = PeRFlow(path="ddpm", learn_sigma=kept, draws=dict(seed=1))
        network.variance.data.fill_(0.25)
        scheduler.training_losses(network, x, INDEX, args)  # the teacher is copied with 0.25
        network.variance.data.fill_(0.75)
        network.zero_grad()
        losses[kept] = scheduler.training_losses(network, x, INDEX, args)["loss"]
        losses[kept].sum().backward()
        assert (network.variance.grad != 0) == kept
        assert scheduler.run.teacher.network.variance.grad is None
    torch.testing.assert_close(losses[True] - losses[False], torch.full((2,), 0.5**2), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", ["perflow", "perflow_consistency", ["perflow", "perflow_consistency"]])
def test_evaluations_without_gradient_do_not_dilute_the_variances_loss(objective):
    network = epsilon_network()
    x, args = batch(network)
    scheduler = PeRFlow(path="ddpm", objective=objective, draws=dict(seed=1))
    scheduler.training_losses(network, x, INDEX, args)
    network.variance.data += 0.1
    network.zero_grad()
    scheduler.training_losses(network, x, INDEX, args)["loss"].mean().backward()
    assert network.variance.grad.item() == pytest.approx(2 * 0.1, rel=1e-3)  # of the squared distance .1


@pytest.mark.parametrize(
    "settings, refused",
    [
        ({}, False),
        (dict(objective=["perflow", "perflow_direction"]), False),
        (dict(draws=dict(per_solve=2)), True),
        (dict(objective=["perflow", "perflow_consistency"]), True),
    ],
)
def test_re_entrant_checkpointing_takes_one_evaluation(settings, refused):
    """As train.py of 1.0 and 1.1 turns it on; ZeRO would stop in its backward pass, with no word of why."""
    network = epsilon_network()
    network.grad_checkpointing = True
    x, args = batch(network)
    with pytest.raises(ValueError, match=r"use draws=dict\(per_solve=1\)") if refused else nullcontext():
        PeRFlow(path="ddpm", **settings).training_losses(network, x, INDEX, args)


@pytest.mark.parametrize("settings", [dict(prediction="velocity"), dict(learn_sigma=False)])
def test_no_variance_is_kept_where_iddpm_could_not_use_it(settings):
    network, scheduler = epsilon_network(), PeRFlow(path="ddpm", **settings)
    scheduler.objective = lambda student, segment, t, w: student(segment.point(t), t).flatten(1).mean(dim=1)
    x, args = batch(network)
    scheduler.training_losses(network, x, INDEX, args)["loss"].sum().backward()
    assert network.variance.grad == 0 and network.gain.grad != 0


def test_fixed_guidance_folds_in_the_guided_channels_only():
    ends = {}
    for cfg_channel in (3, None, "auto"):
        network = epsilon_network()
        scheduler = PeRFlow(path="ddpm", cfg_channel=cfg_channel, guidance=dict(mode="fixed", scale=3.0))
        seen = recorded(scheduler)
        torch.manual_seed(0)
        x, args = batch(network)
        scheduler.training_losses(network, x, args, noise=torch.ones_like(x), t=INDEX)
        ends[cfg_channel] = seen["segment"].x_end
    assert torch.equal(ends[None], ends["auto"])  # no host installed: all channels
    torch.testing.assert_close(ends[3][:, :3], ends[None][:, :3])
    assert not torch.allclose(ends[3][:, 3], ends[None][:, 3])


def test_a_student_start_is_what_its_own_sampler_reaches():
    network, scheduler = epsilon_network(), PeRFlow(path="ddpm", cfg_scale=2.0)
    seen = recorded(scheduler)
    x, args = batch(network)
    noise = torch.randn_like(x)
    scheduler.training_losses(network, x, args, noise=noise, t=torch.tensor([999, 100]))
    segment = seen["segment"]
    assert segment.t_start.tolist() == [1.0, 0.25]
    torch.testing.assert_close(segment.x_start[0], noise[0])  # the solver divides by alpha and multiplies again
    network.seen.clear()
    sampled(scheduler, network, z=noise)
    # The fourth step of the sampler starts at the last window's edge. Same arithmetic, in float32.
    torch.testing.assert_close(segment.x_start[1], network.seen[3]["x"][1], rtol=1e-5, atol=1e-5)


# --- sampling ---


def sampled(scheduler, network, **arguments):
    defaults = dict(prompts=PROMPTS, device="cpu", additional_args=sizes(2))
    with torch.no_grad():
        return scheduler.sample(network, text_encoder(network), **{**defaults, **arguments})


def test_1_0_leaves_drawing_the_noise_to_the_scheduler():
    network, scheduler = epsilon_network(), PeRFlow(path="ddpm")
    torch.manual_seed(3)
    drawn = sampled(scheduler, network, z_size=(4, 5, 2, 2))
    torch.manual_seed(3)
    torch.testing.assert_close(sampled(scheduler, network, z=torch.randn(2, 4, 5, 2, 2)), drawn, rtol=0, atol=0)
    with pytest.raises(ValueError, match="either z or z_size, got neither"):
        sampled(scheduler, network)
    with pytest.raises(ValueError, match="either z or z_size, got both"):
        sampled(scheduler, network, z=drawn, z_size=(4, 5, 2, 2))


@pytest.mark.parametrize("windows", [5, (1, 0.7, 0.4, 0.1, 0)])
def test_an_undistilled_ddim_eps_step_across_a_window_is_a_ddim_step(windows):
    network, z = epsilon_network(), torch.randn(2, 4, 5, 2, 2)
    scheduler = PeRFlow(path="ddpm", windows=windows, cfg_scale=1.0)
    network.y_embedder.y_embedding.zero_()
    encoder = text_encoder(network)
    encoder.encode = lambda **tokens: {"y": torch.zeros(2, 1, 10, 32), "mask": torch.ones(2, 10)}
    got = scheduler.sample(network, encoder, z, PROMPTS, "cpu", additional_args=sizes(2), progress=False)
    state, edges = z.double(), torch.tensor(scheduler.recipe.windows.edges, dtype=torch.float64)
    for t, t_next in zip(edges, edges[1:]):
        a, a_next, s, s_next = (f(v) for f in (PATH.alpha, PATH.sigma) for v in (t, t_next))
        state = state * (a_next / a * (1 - s * s) + s_next * s)
    torch.testing.assert_close(got, state.float(), rtol=1e-4, atol=1e-5)
    assert [call["timestep"][0].item() for call in network.seen] == pytest.approx([1000 * t - 1 for t in edges[:-1].tolist()])


def test_the_first_three_channels_are_guided_as_upstream_guides_them():
    network, z = epsilon_network(), torch.randn(2, 4, 5, 2, 2)
    guided, plain = (sampled(PeRFlow(path="ddpm", windows=1, cfg_channel=3, cfg_scale=s), network, z=z) for s in (5.0, 1.0))
    torch.testing.assert_close(guided[:, 3], plain[:, 3])  # the conditional prediction's
    assert not torch.allclose(guided[:, :3], plain[:, :3])


def test_reference_frames_stay_and_edited_ones_join_on_the_path():
    network, z = epsilon_network(), torch.randn(2, 4, 5, 2, 2)
    mask = torch.tensor([[0.0, 0.5, 1.0, 1.0, 1.0]] * 2)
    out = sampled(PeRFlow(path="ddpm", cfg_scale=1.0), network, z=z, mask=mask)
    assert torch.equal(out[:, :, 0], z[:, :, 0]) and not torch.equal(out[:, :, 1], z[:, :, 1])
    joined = [call["x_mask"][0, :2].tolist() for call in network.seen]
    assert joined == [[False, False], [False, False], [False, True], [False, True]]
    clean = torch.stack([call["x"][:, :, 1] for call in network.seen[:2]])
    assert torch.equal(clean, z[:, :, 1].expand_as(clean))
    # noised to t = 0.5, where alpha_bar is 0.0786: what is left of the clean frame is uncorrelated noise mostly
    assert not torch.allclose(network.seen[2]["x"][:, :, 1], z[:, :, 1])


# --- which path ---


@pytest.mark.parametrize(
    "offered, network, keys, path",
    [
        ((), None, {}, "linear"),
        (("ddpm",), None, {}, "ddpm"),  # 1.0, 1.1
        (("ddpm",), None, dict(num_sampling_steps=20, cfg_scale=7.0), "ddpm"),  # their dpm-solver configs
        (("linear", "ddpm"), None, dict(timestep_respacing=""), "ddpm"),
        (("linear", "ddpm"), None, dict(num_sampling_steps=100, cfg_scale=7.0, cfg_channel=3), "ddpm"),
        (("linear", "ddpm"), None, dict(use_timestep_transform=True), "linear"),
        (("linear", "ddpm"), tiny_network, dict(num_sampling_steps=20, cfg_scale=7.0), "linear"),  # STDiT3's forward
        (("linear", "ddpm"), Epsilon, dict(path="ddpm"), "ddpm"),
        (("linear", "ddpm"), Epsilon, dict(path="linear"), "linear"),
    ],
)
def test_the_path_is_told_by_keys_host_and_network(monkeypatch, offered, network, keys, path):
    monkeypatch.setattr(iddpm, "offered_processes", lambda: offered)
    scheduler = PeRFlow(**keys)
    found, prediction = scheduler.process_of(Epsilon() if network is None else network())
    assert prediction == {"linear": "velocity", "ddpm": "ddim_eps"}[path]
    assert isinstance(found, DDPM) == (path == "ddpm")


def test_a_path_that_cannot_be_told_is_asked_for(monkeypatch):
    monkeypatch.setattr(iddpm, "offered_processes", lambda: ("linear", "ddpm"))
    network = epsilon_network()
    x, args = batch(network)
    with pytest.raises(
        ValueError, match='cannot tell whether Epsilon was trained .*; write path="ddpm" for a network that iddpm'
    ):
        PeRFlow(num_sampling_steps=20, cfg_scale=7.0).training_losses(network, x, args)


def test_keys_of_both_paths_are_refused():
    with pytest.raises(
        ValueError, match='use_timestep_transform belongs to path="linear" .rflow., but cfg_channel to path="ddpm"'
    ):
        PeRFlow(use_timestep_transform=True, cfg_channel=3)
    with pytest.raises(ValueError, match="learn_sigma, cfg_channel belong|cfg_channel, learn_sigma belong"):
        PeRFlow(learn_sigma=True, cfg_channel=3, path="linear")
    with pytest.raises(ValueError, match='but the config says path="ddpm"'):
        PeRFlow(loc=0.0, path="ddpm")


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            dict(use_kl=True),
            "use_kl=True is iddpm's, and perflow takes only False: the student's loss is chosen by `objective`",
        ),
        (dict(sigma_small=True), "the sampler takes deterministic steps"),
        (dict(predict_xstart=True), "teacher and student predict noise"),
        (dict(rescale_learned_sigmas=True), "the variance is kept as the teacher's"),
        (dict(timestep_respacing="10,15,20"), r"divides a diffusion into sections.*windows=\[1, \.\.\., 0\]"),
        (dict(timestep_respacing="ddim25"), "divides a diffusion into sections"),
        (dict(timestep_respacing="20", num_sampling_steps=10), "name the same number"),
        (dict(timestep_respacing="0"), "timestep_respacing must be an integer >= 1"),
        (dict(noise_schedule="sqrt"), "noise_schedule must be one of linear, squaredcos_cap_v2"),
        (dict(diffusion_steps=0), "diffusion_steps must be an integer >= 1"),
        (dict(cfg_channel=0), "cfg_channel .* must be an integer >= 1"),
        (dict(learn_sigma="no"), "learn_sigma must be True or False"),
        (dict(path="cosine"), "path must be one of auto, linear, ddpm"),
    ],
)
def test_iddpms_keys_are_refused_with_what_replaces_them(keys, message):
    with pytest.raises(ValueError, match=message):
        PeRFlow(**keys)


def test_iddpms_keys_keep_their_meaning():
    assert len(PeRFlow(timestep_respacing="20").grid) == 20 + 1
    assert len(PeRFlow(timestep_respacing="").grid) == 4 + 1 and PeRFlow(timestep_respacing="").keys.timestep_respacing == ""
    assert len(PeRFlow(timestep_respacing="", num_sampling_steps=6).grid) == 6 + 1
    assert PeRFlow(diffusion_steps=500).num_timesteps == 500
    process, _ = PeRFlow(noise_schedule="squaredcos_cap_v2").process_of(Epsilon())
    assert process.alpha(torch.tensor([0.5])).item() ** 2 == pytest.approx(0.4938, 1e-3)
    accepted = dict(use_kl=False, sigma_small=False, predict_xstart=False, learn_sigma=True, rescale_learned_sigmas=False)
    assert PeRFlow(**accepted, timestep_respacing=None, cfg_channel=None).keys.path == "ddpm"
