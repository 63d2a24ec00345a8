import pytest
import torch
from problems import Gaussian, LinearInState

from opensora_perflow.method.grids import sampling_grid
from opensora_perflow.method.sampler import FrameEdit, carry_to_windows, sample
from opensora_perflow.method.segment import Segment
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.training.plan_file import windows_of

F64 = torch.float64


def grid(steps, batch_size, windows=4):
    return torch.tensor(sampling_grid(windows_of(windows), steps), dtype=F64)[:, None].expand(-1, batch_size)


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


def test_a_frame_is_frozen_until_its_ratio_and_noised_once():
    z = torch.randn(1, 1, 2, 4, 4)
    seen = []

    def field_at(step, mask):
        return lambda x, t: seen.append((t.item(), x.clone(), mask.clone())) or torch.zeros_like(x)

    generator = torch.Generator().manual_seed(1)
    sample(field_at, z, grid(4, 1), edit=FrameEdit(torch.tensor([[1.0, 0.625]]), generator))
    assert [t for t, _, mask in seen if mask[0, 1]] == [0.625, 0.5, 0.25]
    generator.manual_seed(1)
    noise = [torch.randn(z.shape, generator=generator) for _ in range(5)]
    for _, x, _ in seen[:2]:
        assert torch.equal(x, z)  # still frozen and clean
    joined = seen[2][1][:, :, 1]
    torch.testing.assert_close(joined, 0.375 * z[:, :, 1] + 0.625 * noise[2][:, :, 1])
    assert all(torch.equal(x[:, :, 1], joined) for _, x, _ in seen[3:])  # noised once; the field here is zero


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


@pytest.mark.parametrize("ratio", [0.625, 0.5, 0.875, 0.1])
def test_a_frame_joins_exactly_at_its_ratio(ratio):
    # The reference is chosen so that, with the noise that will be drawn, the frame joins on the straight line of a known
    # trajectory of the teacher: only a join at t = ratio itself ends where that trajectory does.
    teacher, windows = Gaussian(), TimeWindows.uniform(4)
    one, zero, r = (torch.tensor([value], dtype=F64) for value in (1.0, 0.0, torch.tensor(ratio).item()))

    def student(x, t):
        return teacher.window_velocity(x, t, *windows.bounds(windows.lookup(t)))

    start, end = windows.bounds(windows.lookup(r))
    x_start = torch.randn(1, 1, 1, 4, 4, dtype=F64)
    on_the_line = x_start + (r - start) / (end - start) * (teacher.exact(x_start, start, end) - x_start)
    generator = torch.Generator().manual_seed(3)
    joining_draw = sum(edge > r.item() for edge in windows.edges)  # one draw for each step before
    noise = [torch.randn(1, 1, 2, 4, 4, dtype=F64, generator=generator) for _ in range(6)][joining_draw][:, :, 1:]
    z = torch.cat([torch.randn(1, 1, 1, 4, 4, dtype=F64), (on_the_line - r * noise) / (1 - r)], dim=2)
    exact = torch.cat([teacher.exact(z[:, :, :1], one, zero), teacher.exact(x_start, start, zero)], dim=2)

    generator.manual_seed(3)
    edit = FrameEdit(torch.tensor([[1.0, ratio]]), generator)
    torch.testing.assert_close(sample(lambda step, mask: student, z, grid(4, 1), edit=edit), exact, atol=1e-12, rtol=0)


def test_a_split_step_costs_one_evaluation_for_each_ratio_inside_it():
    def evaluations(*ratios):
        seen = []
        edit = FrameEdit(torch.tensor(ratios))
        x = torch.zeros(len(ratios), 1, len(ratios[0]), 1, 1)
        out = sample(
            lambda step, mask: lambda x, t: seen.append((step, t.tolist())) or torch.ones_like(x), x, grid(4, len(x)), edit=edit
        )
        moved = [[ratio == 1 for ratio in row] for row in ratios]
        torch.testing.assert_close(out[:, 0, :, 0, 0][torch.tensor(moved)], torch.full((sum(map(sum, moved)),), -1.0))
        return seen

    assert len(evaluations([1.0, 0.0, 0.75, 0.5])) == 4
    assert evaluations([1.0, 0.625, 0.625]) == [(0, [1.0]), (1, [0.75]), (1, [0.625]), (2, [0.5]), (3, [0.25])]
    assert len(evaluations([1.0, 0.625, 0.6, 0.1])) == 7
    # Samples of a batch have ratios of their own; one without any stands still meanwhile.
    assert evaluations([1.0, 0.625], [1.0, 0.0])[1:3] == [(1, [0.75, 0.75]), (1, [0.625, 0.75])]


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


def test_segments_of_the_sampler_and_of_training_agree():
    segment = Segment(torch.randn(2, 1), torch.randn(2, 1), torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64))
    out = sample(lambda step, mask: lambda x, t: segment.velocity, segment.x_start, grid(4, 2))
    torch.testing.assert_close(out, segment.x_end)


@pytest.mark.parametrize("whole", [False, True])
def test_each_sample_is_carried_to_its_own_window(whole):
    field, asked = LinearInState(1.3), []

    def field_of(k, rows):
        def velocity(x, t):
            asked.append((k, None if rows is None else rows.tolist(), len(x)))
            return field(x, t)

        return velocity

    edges = torch.tensor([[1.0, 0.75, 0.5, 0.0], [1.0, 0.9, 0.6, 0.0], [1.0, 0.8, 0.2, 0.0]], dtype=F64).T
    window_idx, noise = torch.tensor([0, 2, 1]), torch.randn(3, 5, dtype=F64)
    reached = carry_to_windows(field_of, noise, edges, window_idx, whole=whole)
    # One Euler step of v = a x multiplies by 1 + a h; algebra in float64.
    factor = torch.tensor([1.0, (1 - 0.13) * (1 - 0.39), 1 - 0.26], dtype=F64)[:, None]
    torch.testing.assert_close(reached, factor * noise, atol=1e-12, rtol=0)
    assert torch.equal(reached[0], noise[0])
    # Samples that have arrived leave the batch.
    assert asked == ([(0, None, 3), (1, None, 3)] if whole else [(0, [1, 2], 2), (1, [1], 1)])
    in_the_first = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(carry_to_windows(field_of, noise, edges, in_the_first), noise) and len(asked) == 2
