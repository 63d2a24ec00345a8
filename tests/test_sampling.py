import pytest
import torch
from problems import Gaussian, LinearInState

from opensora_perflow.objectives import WindowPair
from opensora_perflow.sampling import FrameEdit, carry_to_windows, sample
from opensora_perflow.schedule import sampling_grid
from opensora_perflow.windows import TimeWindows

F64 = torch.float64


def grid(steps, batch_size, windows=4):
    return torch.tensor(sampling_grid(TimeWindows.from_config(windows), steps), dtype=F64)[:, None].expand(-1, batch_size)


def test_one_step_a_window_is_exact_on_the_students_own_straight_flow():
    teacher, windows = Gaussian(), TimeWindows((1.0, 0.7, 0.3, 0.0))

    def student(x, t):
        start, end = windows.bounds(windows.lookup(t))
        return teacher.window_velocity(x, t, start, end)

    x = torch.randn(4, 3, dtype=F64)
    exact = teacher.exact(x, torch.ones(4, dtype=F64), torch.zeros(4, dtype=F64))
    for steps in (3, 6, 30):  # more steps stay on the same straight lines
        got = sample(lambda step, mask: student, x, grid(steps, 4, windows))
        torch.testing.assert_close(got, exact, atol=1e-12, rtol=0)


def test_a_step_per_interval():
    steps = []
    sample(lambda step, mask: steps.append(step) or Gaussian(), torch.randn(2, 1), grid(5, 2))
    assert steps == [0, 1, 2, 3, 4]


def test_kept_frames_are_kept_and_the_rest_moves():
    z = torch.randn(1, 2, 3, 1, 1)
    ratio = torch.tensor([[1.0, 0.0, 1.0]])
    masks = []

    def field_at(step, mask):
        masks.append(mask.tolist())
        return lambda x, t: torch.ones_like(x)

    out = sample(field_at, z, grid(4, 1), edit=FrameEdit(ratio))
    assert torch.equal(out[:, :, 1], z[:, :, 1])
    torch.testing.assert_close(out[:, :, [0, 2]], z[:, :, [0, 2]] - 1)
    assert masks == [[[True, False, True]]] * 4


def test_an_edited_frame_joins_noised_at_the_first_time_below_its_ratio():
    z = torch.randn(1, 1, 2, 4, 4)
    seen = []

    def field_at(step, mask):
        return lambda x, t: seen.append((t.item(), x.clone(), mask.clone())) or torch.zeros_like(x)

    generator = torch.Generator().manual_seed(1)
    sample(field_at, z, grid(4, 1), edit=FrameEdit(torch.tensor([[1.0, 0.6]]), generator))
    assert [t for t, _, mask in seen if mask[0, 1]] == [0.5, 0.25]
    generator.manual_seed(1)
    noise = [torch.randn(z.shape, generator=generator) for _ in range(4)]
    for _, x, _ in seen[:2]:
        assert torch.equal(x, z)  # still frozen and clean
    joined = seen[2][1][:, :, 1]
    torch.testing.assert_close(joined, 0.5 * z[:, :, 1] + 0.5 * noise[2][:, :, 1])
    assert torch.equal(seen[3][1][:, :, 1], joined)  # noised once; the field here is zero


def test_a_ratio_on_the_grid_joins_there():
    # 0.7 is not a float32 number; the host compares it with 1 - 3/10 as equal.
    seen = []
    sample(
        lambda step, mask: seen.append(bool(mask[0, 0])) or (lambda x, t: torch.zeros_like(x)),
        torch.randn(1, 1, 1, 1, 1),
        grid(10, 1, windows=1),
        edit=FrameEdit(torch.tensor([[0.7]])),
    )
    assert seen.index(True) == 3


def test_before_step_acts_on_every_step():
    out = sample(
        lambda step, mask: lambda x, t: torch.ones_like(x),
        torch.zeros(2, 1),
        grid(4, 2),
        before_step=lambda x, t: torch.full_like(x, 3.0),
    )
    torch.testing.assert_close(out, torch.full((2, 1), 2.75))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_dtype_is_that_of_the_noise(dtype):
    assert sample(lambda step, mask: Gaussian(), torch.randn(2, 3, dtype=dtype), grid(4, 2)).dtype == dtype


def test_window_pair_of_the_sampler_and_of_training_agree():
    pair = WindowPair(torch.randn(2, 1), torch.randn(2, 1), torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64))
    out = sample(lambda step, mask: lambda x, t: pair.velocity, pair.x_start, grid(4, 2))
    torch.testing.assert_close(out, pair.x_end)


def test_each_sample_is_carried_to_its_own_window():
    field = LinearInState(1.3)
    edges = torch.tensor([[1.0, 0.75, 0.5, 0.0], [1.0, 0.9, 0.6, 0.0], [1.0, 0.8, 0.2, 0.0]], dtype=F64).T
    window_idx = torch.tensor([0, 2, 1])
    noise = torch.randn(3, 5, dtype=F64)
    reached = carry_to_windows(field, noise, edges, window_idx)
    # One Euler step of v = a x multiplies by 1 + a h; algebra in float64.
    factor = torch.tensor([1.0, (1 - 0.13) * (1 - 0.39), 1 - 0.26], dtype=F64)[:, None]
    torch.testing.assert_close(reached, factor * noise, atol=1e-12, rtol=0)
    assert field.calls == 2 and torch.equal(reached[0], noise[0])
    assert torch.equal(carry_to_windows(field, noise, edges, torch.zeros(3, dtype=torch.int64)), noise) and field.calls == 2
