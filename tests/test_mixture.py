"""The benchmark's mixture: its closed form, and the scheduler on it."""

import pytest
import torch
from problems import Gaussian

from opensora_perflow import PeRFlow
from opensora_perflow.worlds.mixture import NUM_CLASSES, ClassText, Mixture, MixtureNetwork


def velocity(network, x, t, y):
    return -network(x[:, :, None, None, None], 1000 * t, y).flatten(1)


def test_equal_means_are_one_gaussian():
    network = MixtureNetwork(Mixture(torch.full((24, 16), 0.8), torch.arange(24) % 4, std=0.4))
    x, t = torch.randn(50, 16), torch.linspace(0.02, 1, 50)
    exact = Gaussian(0.8, 0.4)(x.double(), t.double())
    for y in (ClassText().encode(["class 1"] * 50)["y"], ClassText().null(50)):
        # float32; the division by the variance, 0.1 at least, amplifies its rounding.
        torch.testing.assert_close(velocity(network, x, t, y).double(), exact, rtol=1e-4, atol=1e-5)


def test_the_velocity_is_the_mean_of_noise_minus_data():
    mixture, count = Mixture.standard(), 200_000
    class_idx = torch.full((count,), 2)
    data, noise = mixture.draw(class_idx).flatten(1), torch.randn(count, 16)
    x, t = 0.5 * data + 0.5 * noise, torch.full((count,), 0.5)
    v = velocity(MixtureNetwork(mixture), x, t, ClassText().of(class_idx)["y"])
    residual = noise - data - v
    # The conditional mean leaves nothing that correlates with a function of x: each mean of 200000 products of
    # standard deviation near 1 has an error of 0.0022; five of them.
    assert residual.mean(dim=0).abs().max() < 0.012
    assert (residual * x).mean(dim=0).abs().max() < 0.012
    assert (residual * x.tanh().roll(1, dims=1)).mean(dim=0).abs().max() < 0.012


def test_the_null_text_asks_for_all_classes():
    mixture = Mixture.standard()
    x, t = torch.randn(64, 16), torch.full((64,), 1.0)
    network = MixtureNetwork(mixture)
    # At t = 1 the state says nothing about the data: velocity = noise - mean of the data.
    for k in range(NUM_CLASSES):
        mean = mixture.means[mixture.classes == k].mean(dim=0)
        torch.testing.assert_close(
            velocity(network, x, t, ClassText().of(torch.full((64,), k))["y"]), x - mean, atol=1e-5, rtol=0
        )
    torch.testing.assert_close(velocity(network, x, t, ClassText().null(64)), x - mixture.means.mean(dim=0), atol=1e-5, rtol=0)


def test_an_unknown_prompt_is_refused():
    with pytest.raises(ValueError, match="prompts must be among class 0, .*got 'a cat'"):
        ClassText().encode(["a cat"])


def test_the_scheduler_learns_on_it():
    mixture = Mixture.standard()
    student, text = MixtureNetwork(mixture, width=64), ClassText()
    scheduler = PeRFlow(
        guidance=dict(mode="fixed", scale=2.0),
        teacher=dict(steps_per_window=2, solver="midpoint"),
        draws=dict(edge_mass=0.5, per_solve=2, starts="student"),
    )
    noise, prompts = torch.randn(256, 16, 1, 1, 1), [f"class {i % 4}" for i in range(256)]

    def sampled(steps, network, **settings):
        with torch.no_grad():
            return PeRFlow(num_sampling_steps=steps, **settings).sample(network, text, noise, prompts, "cpu", progress=False)

    endpoints = sampled(64, student, windows=1, cfg_scale=2.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=4e-3)
    fixed = dict(guidance=dict(mode="fixed", scale=2.0))
    before = (sampled(4, student, **fixed) - endpoints).square().mean().sqrt()
    for _ in range(150):
        class_idx = torch.randint(4, (128,))
        loss = scheduler.training_losses(student, torch.zeros(128, 16, 1, 1, 1), text.of(class_idx))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = (sampled(4, student, **fixed) - endpoints).square().mean().sqrt()
    assert after < 0.8 * before  # from noise and classes alone; 0.73 with this seed
