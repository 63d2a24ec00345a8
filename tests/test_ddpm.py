import pytest
import torch

from opensora_perflow.method.ddpm import WindowEdges, edge_map, target, to_velocity

F64 = torch.float64


def variance_preserving(t_start, t_end):
    """A cosine path: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""
    angle_start, angle_end = t_start * torch.pi / 2, t_end * torch.pi / 2
    return WindowEdges(t_start, t_end, angle_start.cos(), angle_end.cos(), angle_start.sin(), angle_end.sin())


@pytest.fixture
def edges():
    return variance_preserving(torch.tensor([0.9, 0.5, 0.3], dtype=F64), torch.tensor([0.5, 0.3, 0.05], dtype=F64))


@pytest.mark.parametrize("prediction", ["velocity", "ddim_eps", "diff_eps"])
@pytest.mark.parametrize("where", [0.0, 0.3, 1.0])
def test_every_prediction_leads_back_to_the_window_velocity(edges, prediction, where):
    x_start, x_end = torch.randn(2, 3, 4, 2, 2, 2, dtype=F64)
    t = edges.t_start + where * (edges.t_end - edges.t_start)
    x_t = x_start + where * (x_end - x_start)
    output = target(x_start, x_end, edges, prediction)
    v = (x_end - x_start) / (edges.t_end - edges.t_start)[:, None, None, None, None]
    torch.testing.assert_close(to_velocity(output, x_t, t, edges, prediction), v, atol=1e-11, rtol=1e-11)


def test_ddim_eps_of_one_ddim_step_is_its_epsilon(edges):
    # A deterministic DDIM step: x_e = alpha_e (x_s - sigma_s e) / alpha_s + sigma_e e (arXiv:2010.02502, eq. 12).
    x_start, eps = torch.randn(2, 3, 4, dtype=F64)
    a_s, a_e, s_s, s_e = (v[:, None] for v in (edges.alpha_start, edges.alpha_end, edges.sigma_start, edges.sigma_end))
    x_end = a_e * (x_start - s_s * eps) / a_s + s_e * eps
    torch.testing.assert_close(target(x_start, x_end, edges, "ddim_eps"), eps, atol=1e-12, rtol=1e-12)


def test_diff_eps_is_the_noise_between_the_marginals(edges):
    # x_s = gamma x_e + sqrt(1 - gamma^2) e carries the marginal at t_e to the one at t_s on a variance-preserving path.
    x_end, eps = torch.randn(2, 3, 4, dtype=F64)
    gamma = (edges.alpha_start / edges.alpha_end)[:, None]
    x_start = gamma * x_end + (1 - gamma**2).sqrt() * eps
    torch.testing.assert_close(target(x_start, x_end, edges, "diff_eps"), eps, atol=1e-12, rtol=1e-12)


def test_epsilon_needs_signal_at_the_noisy_edge():
    rectified = variance_preserving(torch.ones(1, dtype=F64), torch.full((1,), 0.5, dtype=F64))
    rectified = WindowEdges(**{**rectified.__dict__, "alpha_start": torch.zeros(1, dtype=F64)})
    with pytest.raises(ValueError, match='use prediction="velocity" for rectified-flow models'):
        edge_map(rectified, "ddim_eps")


def test_unknown_prediction_is_refused(edges):
    with pytest.raises(ValueError, match="unknown epsilon prediction 'x0'"):
        edge_map(edges, "x0")
