"""The worlds of benchmarks/modes.py: their closed form, where it is known otherwise."""

import pytest
import torch
from modes import Modes, ModesNetwork, ar1, forty, rings

from opensora_perflow.worlds.mixture import ClassText, Mixture, MixtureNetwork

WORLDS = {"forty": forty, "rings": rings, "ar1": ar1}


def test_modes_alike_are_the_packages_mixture():
    mixture = Mixture.standard()
    axes = torch.linalg.qr(torch.randn(24, 16, 16, generator=torch.Generator().manual_seed(0)))[0]
    x, y = torch.randn(7, 16, 1, 1, 1), ClassText().of(torch.tensor([0, 1, 2, 3, 4, 4, 0]))["y"]
    timestep = 1000 * torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01])
    expected, variances = MixtureNetwork(mixture)(x, timestep, y), torch.full((24, 1), mixture.std**2)
    for turned in (None, axes):  # a round mode has any axes
        modes = Modes(
            mixture.means,
            variances.expand(24, 16 if turned is not None else 1),
            torch.ones(24),
            mixture.classes,
            (16, 1, 1, 1),
            turned,
        )
        # float32, through softmax of exponents up to 1e2
        torch.testing.assert_close(ModesNetwork(modes)(x, timestep, y), expected, rtol=1e-3, atol=1e-4)


def test_the_flow_of_one_mode_carries_noise_along_its_axes():
    axes = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    mean, variances = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.04, 0.25, 1.0]).double()
    modes = Modes(mean[None], variances[None], torch.ones(1), torch.zeros(1, dtype=torch.long), (3, 1, 1, 1), axes[None])
    network, y = ModesNetwork(modes).double(), ClassText().of(torch.zeros(5, dtype=torch.long))["y"].double()[:, 0, 0]
    noise = torch.randn(5, 3).double()

    def state(t):  # x(t) = (1-t) m + U sqrt((1-t)^2 S + t^2) U^T noise
        return (1 - t) * mean + (noise @ axes * ((1 - t) ** 2 * variances + t**2).sqrt()) @ axes.T

    for t in (0.9, 0.5, 0.1):
        slope = (state(t + 1e-5) - state(t - 1e-5)) / 2e-5
        # A central difference of step h errs by h^2 times a third derivative of below 1e3.
        torch.testing.assert_close(network.velocity(state(t), torch.full((5,), t).double(), y), slope, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", WORLDS)
def test_data_have_the_weights_and_moments_of_their_modes(name):
    modes, generator = WORLDS[name](), torch.Generator().manual_seed(0)
    if modes.axes is not None:
        eye = torch.eye(modes.axes.shape[1]).expand_as(modes.axes)
        torch.testing.assert_close(modes.axes.transpose(1, 2) @ modes.axes, eye, rtol=0, atol=1e-5)
    x = modes.draw(torch.zeros(20_000, dtype=torch.long), generator)
    assert x.shape == (20_000, *modes.shape)
    asked = (modes.classes == 0) * modes.weights / modes.weights[modes.classes == 0].sum()
    variances = (
        modes.variances.expand_as(modes.means) if modes.axes is None else (modes.axes**2 @ modes.variances[:, :, None])[:, :, 0]
    )
    mean = asked @ modes.means
    variance = asked @ (variances + (modes.means - mean) ** 2)
    # Five standard errors of a mean; the variance's own is about as many halves of a percent.
    assert ((x.flatten(1).mean(dim=0) - mean).abs() < 5 * (variance / 20_000).sqrt()).all()
    torch.testing.assert_close(x.flatten(1).var(dim=0), variance, rtol=0.06, atol=0)
