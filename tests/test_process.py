"""Both paths on solved cases. The diffusion path's exact flow: Gaussian data stays Gaussian, x(t) keeps its quantile."""

import math
from functools import partial

import pytest
import torch
from problems import Constant, Gaussian, log_slope

from opensora_perflow.method.ddpm import DDPM, alpha_bars
from opensora_perflow.method.grids import linear_grid
from opensora_perflow.method.process import Linear, check_prediction
from opensora_perflow.method.windows import TimeWindows

F64 = torch.float64
PATH = DDPM.from_schedule()


class ToldTime(DDPM):
    """A network that is told the flow time itself: its answers are exact, where whole float32 timesteps round."""

    def to_timestep(self, t):
        return t


class LinearToldTime(Linear):
    def to_timestep(self, t):
        return t


EXACT = ToldTime.from_schedule()
UNEQUAL = TimeWindows((1.0, 0.62, 0.31, 0.05, 0.0))


def last_state(path, *arguments, **settings):
    """The end of a solution."""
    *_, state = path.states(*arguments, **settings)
    return state


class DiffusedGaussian:
    """Data N(m, s^2) on a path: x_t is N(alpha m, alpha^2 s^2 + sigma^2), and its best epsilon is linear in x."""

    def __init__(self, path, m=0.8, s=0.4):
        self.path, self.m, self.s, self.times = path, m, s, []

    def moments(self, t):
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return (alpha * self.m)[:, None], torch.sqrt(alpha**2 * self.s**2 + sigma**2)[:, None], sigma[:, None]

    def __call__(self, x, t):
        self.times.append(t)
        mean, std, sigma = self.moments(t)
        return sigma * (x - mean) / std**2

    def exact(self, x, t, t_end):
        (mean, std, _), (mean_end, std_end, _) = self.moments(t), self.moments(t_end)
        return mean_end + std_end / std * (x - mean)


# --- the path itself ---


def test_the_linear_schedule_is_the_hosts():
    table = alpha_bars()
    # The figures of betas 1e-4..0.02 over 1000 steps, as every Open-Sora's GaussianDiffusion holds them.
    expected = torch.tensor([0.9999, 0.5241, 0.0786, 0.00335, 4.04e-5], dtype=F64)
    torch.testing.assert_close(table[[0, 249, 499, 749, 999]], expected, rtol=2e-3, atol=0)
    by_hand = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(500))
    assert table[499].item() == pytest.approx(by_hand, rel=1e-12)


def test_the_cosine_schedule_follows_its_alpha_bar():
    table = alpha_bars("squaredcos_cap_v2")
    t = torch.tensor([0.25, 0.5, 0.75], dtype=F64)
    curve = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(table[[249, 499, 749]], curve, rtol=1e-9, atol=0)


def test_index_i_is_time_i_plus_one_over_n():
    index = torch.tensor([0, 1, 249, 500, 999])
    t = PATH.from_timestep(index)
    torch.testing.assert_close(t, (index + 1).to(F64) / 1000, rtol=0, atol=0)
    assert torch.equal(PATH.to_timestep(t), index.float())
    torch.testing.assert_close(PATH.alpha(t) ** 2, alpha_bars()[index], rtol=1e-12, atol=0)
    torch.testing.assert_close(PATH.alpha(t) ** 2 + PATH.sigma(t) ** 2, torch.ones(5, dtype=F64), rtol=0, atol=1e-14)


def test_the_clean_end_is_data_and_asks_the_network_for_index_zero():
    zero = torch.zeros(1, dtype=F64)
    data, noise = torch.randn(2, 1, 4, dtype=F64)
    assert torch.equal(PATH.add_noise(data, noise, zero), data) and PATH.to_timestep(zero) == 0
    as_published = DDPM(alpha_bars(), final_alpha_bar=alpha_bars()[0].item())
    assert as_published.alpha(zero) ** 2 == pytest.approx(0.9999)


def test_the_clock_inverts():
    t = torch.cat([torch.linspace(0, 1, 4001, dtype=F64), torch.rand(1000, dtype=F64)])
    # Near t = 1 the clock is 157 and grows with exp: float64's 1e-16 stays 1e-13 in t.
    torch.testing.assert_close(PATH.time_of(PATH.noise_ratio(t)), t, rtol=0, atol=1e-12)


def test_a_table_that_rises_is_refused():
    with pytest.raises(ValueError, match="alpha_bar must descend"):
        DDPM(torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match="unknown noise_schedule 'sqrt'; known: linear, squaredcos_cap_v2"):
        alpha_bars("sqrt")


# --- the teacher's solve ---


def test_an_euler_step_is_a_ddim_step():
    x, eps = torch.randn(2, 3, 5, dtype=F64)
    t, t_next = torch.tensor([[1.0, 0.5, 0.03], [0.7, 0.05, 0.0]], dtype=F64)
    got = last_state(EXACT, lambda state, time: eps, x, torch.stack([t, t_next]))
    a, a_next, s, s_next = (v[:, None] for v in (PATH.alpha(t), PATH.alpha(t_next), PATH.sigma(t), PATH.sigma(t_next)))
    data = (x - s * eps) / a
    torch.testing.assert_close(got, a_next * data + s_next * eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_order_on_unequal_windows(method, order):
    """Every sample crosses a window of another width; each converges to the exact flow at the declared order.

    Heun is proved on the first three windows: the last ends at t = 0, where the clock's square root costs it its second order.
    """
    window_idx = torch.arange(4 if order == 1 else 3)
    t, t_end = UNEQUAL.bounds(window_idx)
    field, x = DiffusedGaussian(EXACT), torch.tensor([[0.3], [-1.2], [1.9], [0.5]], dtype=F64)[window_idx]
    steps = [32, 64, 128, 256]
    errors = [
        (last_state(EXACT, field, x, linear_grid(t, t_end, n), method=method) - field.exact(x, t, t_end)).abs()[:, 0]
        for n in steps
    ]
    for window, error in enumerate(torch.stack(errors).T.tolist()):
        assert log_slope(steps, error) == pytest.approx(order, abs=0.15), f"window {window}: {error}"


def test_the_network_is_asked_at_the_grid_and_nowhere_else():
    t, t_end = UNEQUAL.bounds(torch.arange(4))
    field, times = DiffusedGaussian(EXACT), linear_grid(t, t_end, 5)
    last_state(EXACT, field, torch.randn(4, 1, dtype=F64), times)
    torch.testing.assert_close(torch.stack(field.times), times[:-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", [PATH, Linear()], ids=["ddpm", "linear"])
def test_frozen_frames_stay_what_they_are(path):
    mask = torch.tensor([[True, False, True]])
    x, seen = torch.randn(1, 2, 3, 1, 1), []

    def output(state, t):
        seen.append(state)
        return torch.where(mask[:, None, :, None, None], torch.ones_like(state), torch.nan)

    times = torch.tensor([[0.8], [0.5], [0.3]], dtype=F64)
    end = last_state(path, output, x, times, frame_mask=mask)
    assert torch.equal(end[:, :, 1], x[:, :, 1]) and torch.isfinite(end).all() and not torch.equal(end[:, :, 0], x[:, :, 0])
    assert all(torch.equal(state[:, :, 1], x[:, :, 1]) for state in seen)  # what the network sees of them


def test_on_the_linear_path_the_output_is_minus_the_velocity():
    field, x = Gaussian(), torch.randn(3, 2, dtype=F64)
    times = linear_grid(torch.full((3,), 0.9, dtype=F64), torch.tensor([0.5, 0.2, 0.0], dtype=F64), 400)
    end = last_state(LinearToldTime(), lambda state, t: -field(state, t), x, times, method="heun")
    torch.testing.assert_close(end, field.exact(x, times[0], times[-1]), rtol=0, atol=1e-5)  # heun: 1/400^2


def test_float32_stays_float32():
    assert (
        last_state(PATH, Constant(), torch.randn(2, 3), linear_grid(*UNEQUAL.bounds(torch.tensor([0, 3])), 4)).dtype
        == torch.float32
    )


# --- the student ---


@pytest.mark.parametrize("prediction", DDPM.predictions)
def test_a_perfect_student_crosses_each_window_in_any_number_of_steps(prediction):
    from opensora_perflow.method.ddpm import target
    from opensora_perflow.method.sampler import sample

    t, t_end = UNEQUAL.bounds(torch.arange(4))
    x_start, x_end = torch.randn(2, 4, 6, dtype=F64)
    output = target(x_start, x_end, PATH.edges(t, t_end), prediction)
    velocity = partial(PATH.velocity, lambda x, time: output, prediction, lambda time: (t, t_end))
    for steps in (1, 3):
        got = sample(lambda step, mask: velocity, x_start, linear_grid(t, t_end, steps))
        torch.testing.assert_close(got, x_end, rtol=0, atol=1e-10)  # eta up to 157 amplifies rounding


@pytest.mark.parametrize("prediction", DDPM.predictions)
def test_output_units_turn_velocity_errors_into_output_errors(prediction):
    t_start, t_end = UNEQUAL.bounds(torch.arange(4))
    t = t_end + torch.tensor([1.0, 0.3, 0.01, 0.7], dtype=F64) * (t_start - t_end)
    x, output = torch.randn(2, 4, 6, dtype=F64)
    error = torch.tensor([0.1, -2.0, 0.5, 1.0], dtype=F64)

    def velocity(value):
        return PATH.velocity(lambda state, time: value, prediction, lambda time: (t_start, t_end), x, t)

    size = (velocity(output + error[:, None]) - velocity(output)).abs().mean(dim=1)
    units = PATH.output_units(prediction, lambda time: (t_start, t_end))
    factor = 1.0 if units is None else units(t).abs()
    torch.testing.assert_close(size * factor, error.abs(), rtol=1e-9, atol=0)


def test_predictions_are_the_paths():
    assert check_prediction(Linear(), "auto") == "velocity" and check_prediction(PATH, "auto") == "ddim_eps"
    with pytest.raises(ValueError, match="prediction='diff_eps' needs an epsilon network"):
        check_prediction(Linear(), "diff_eps")


def test_timesteps_of_a_rectified_flow_round_trip_in_float64():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=F64)
    timestep = Linear(1000).to_timestep(t)
    assert timestep.dtype == torch.float32 and timestep.tolist() == [0.0, 250.0, 1000.0]
    assert torch.equal(Linear(1000).from_timestep(timestep), t)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_networks_sign_is_that_of_its_host(sign):
    x, t = torch.randn(2, 3), torch.tensor([0.2, 0.9], dtype=F64)
    told = []
    velocity = Linear(1000, sign).velocity(lambda state, timestep: told.append(timestep) or state, "velocity", None, x, t)
    assert torch.equal(velocity, sign * x) and told[0].tolist() == [200.0, 900.0]
