import pytest
import torch
from scenes import SceneNetwork, Scenes

from opensora_perflow.method.solvers import solve
from opensora_perflow.worlds.mixture import ClassText

F64 = torch.float64


def one_scene(std=0.5):
    return Scenes(torch.randn(1, 3, generator=torch.Generator().manual_seed(1)).double(), torch.zeros(1), std)


def test_the_velocity_is_the_gradient_of_the_potential_it_comes_from():
    # With Tweedie's formula E[data | x] = (x + t^2 grad log p) / (1 - t), so v = (x - E[data | x]) / t is known from log p,
    # which autograd differentiates: an independent way to the same field. Frames given at t = 0 are conditioned on by being
    # a small t. 1e-9: algebra in float64, divided by t.
    scenes = Scenes.standard()
    means = scenes.means.double()
    scenes = Scenes(means, scenes.classes, scenes.std)
    t = torch.tensor([[0.7, 0.7, 0.7, 0.7], [0.3, 0.3, 0.3, 0.3]], dtype=F64)
    x = torch.randn(2, 8, 4, dtype=F64, requires_grad=True)
    asked = torch.zeros(2, 12, dtype=F64)
    asked[1, 5:] = -torch.inf
    a = 1 - t
    covariance = scenes.std**2 * a[:, :, None] * Scenes.correlation(4).double() * a[:, None] + torch.diag_embed(t**2)
    frames = [
        torch.distributions.MultivariateNormal((a[:, None] * mean[:, None]), covariance[:, None]).log_prob(x).sum(dim=1)
        for mean in means
    ]
    density = torch.logsumexp(torch.stack(frames, dim=1) + asked, dim=1).sum()
    (score,) = torch.autograd.grad(density, x)
    time = t[:, None]
    data = (x + time**2 * score) / (1 - time)
    torch.testing.assert_close(scenes.velocity(x, t, asked), (x - data) / time, atol=1e-6, rtol=0)  # R is float32


def test_given_frames_decide_the_others_as_conditioning_does():
    # One scene is a Gaussian, whose flow is known at both ends: noise n goes to the conditional mean plus the conditional
    # standard deviation times n. Heun's error with 200 steps is some 1e-4.
    scenes, given = one_scene(), torch.tensor([True, True, False])
    generated = (~given).double()[None]
    noise = torch.randn(1, 3, 3, dtype=F64)
    head = scenes.means[:, :, None] + 0.5 * torch.randn(1, 3, 2, dtype=F64)
    x = torch.cat([head, noise[:, :, 2:]], dim=2)
    times = torch.linspace(1, 0, 201, dtype=F64)[:, None]

    def velocity(x, t):
        return scenes.velocity(x, t[:, None] * generated, torch.zeros(1, 1, dtype=F64)) * generated[:, None]

    out = solve(velocity, x, times, method="midpoint")
    correlation = Scenes.correlation(3).double()
    row, block = correlation[2, :2], correlation[:2, :2]
    weights = torch.linalg.solve(block, row)
    mean = scenes.means[0] + (head[0] - scenes.means[0][:, None]) @ weights
    std = 0.5 * torch.sqrt(1 - row @ weights)
    torch.testing.assert_close(out[0, :, 2], mean + std * noise[0, :, 2], atol=1e-3, rtol=0)
    assert torch.equal(out[:, :, :2], head)


def test_drawn_videos_have_the_stated_moments_wherever_they_are_cut():
    scenes = Scenes.standard()
    generator = torch.Generator().manual_seed(0)
    class_idx = torch.arange(4).repeat(20_000)
    videos = scenes.draw(class_idx, 10, generator)[..., 0, 0]
    own = scenes.means[scenes.classes == 2].mean(dim=0)
    torch.testing.assert_close(videos[class_idx == 2].mean(dim=(0, 2)), own, atol=0.02, rtol=0)  # 60000 frames
    change = videos.diff(dim=2).square().mean(dim=(0, 1))  # 2 s^2 (1 - R(1)), at every place
    torch.testing.assert_close(change, torch.full((9,), 0.5 * (1 - Scenes.correlation(2)[0, 1].item())), rtol=0.02, atol=0)


def test_the_correlation_is_one():
    torch.linalg.cholesky(Scenes.correlation(60))


def test_an_untrained_network_is_the_scenes_own_flow():
    scenes = Scenes.standard()
    network, text = SceneNetwork(scenes, 5), ClassText()
    x, mask = torch.randn(2, 8, 5, 1, 1), torch.tensor([[False, True, True, True, True]] * 2)
    out = network(x, torch.tensor([400.0, 800.0]), text.encode(["class 1", "class 3"])["y"], x_mask=mask)
    times = torch.tensor([[0.4], [0.8]]) * mask
    expected = -scenes.velocity(x.flatten(2), times, network.log_asked[[1, 3]])
    torch.testing.assert_close(out.flatten(2), expected)
    with pytest.raises(ValueError, match="prompts must be among"):
        text.encode(["class 9"])
