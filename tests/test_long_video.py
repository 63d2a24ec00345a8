import pytest
import torch

from opensora_perflow.method.long_video import fade_change


def clip(*values):
    return torch.tensor(values)[None, None, :, None, None]


def kept(*values):
    return torch.tensor([values]).bool()


def faded(x, reference, frames, num_frames):
    return fade_change(x, reference, frames, num_frames)[0, 0, :, 0, 0].tolist()


def test_the_change_of_the_last_kept_frame_fades_out_linearly():
    # The second kept frame was given as 4 and made anew as 1: 3 of it goes on with 2/3 and 1/3.
    x, reference = clip(9.0, 1.0, 1.0, 1.0, 1.0), clip(7.0, 4.0, 0.0, 0.0, 0.0)
    head = kept(1, 1, 0, 0, 0)
    assert faded(x, reference, head, 2) == pytest.approx([7.0, 4.0, 3.0, 2.0, 1.0])
    assert faded(x, reference, head, 0) == [7.0, 4.0, 1.0, 1.0, 1.0]
    assert faded(x, reference, head, 9)[:3] == pytest.approx([7.0, 4.0, 3.7])  # longer than the clip


def test_both_sides_of_a_kept_frame_and_frames_between_two():
    middle = faded(clip(*[0.0] * 5), clip(0.0, 0.0, 3.0, 0.0, 0.0), kept(0, 0, 1, 0, 0), 2)
    assert middle == pytest.approx([1.0, 2.0, 3.0, 2.0, 1.0])
    ends = faded(clip(*[0.0] * 5), clip(4.0, 0.0, 0.0, 0.0, 8.0), kept(1, 0, 0, 0, 1), 3)
    assert ends == [4.0, 3.0 + 2.0, 2.0 + 4.0, 1.0 + 6.0, 8.0]


def test_a_moved_clip_is_moved_back():
    # A whole clip off by one constant: beside the joint it comes back where it was, farther away it stays, without a step
    # larger than 1 / (n + 1) of the constant.
    x = torch.randn(2, 3, 6, 2, 2)
    back = fade_change(x + 5.0, x, kept(1, 1, 0, 0, 0, 0).expand(2, -1), 4)
    torch.testing.assert_close((back - x)[0, 0, :, 0, 0], torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 4.0]))


def test_nothing_kept_or_nothing_changed_is_left_alone():
    x = torch.randn(2, 3, 5, 2, 2)
    assert torch.equal(fade_change(x, torch.zeros_like(x), torch.zeros(2, 5).bool(), 2), x)
    assert torch.equal(fade_change(x, x, kept(1, 1, 0, 0, 0).expand(2, -1), 2), x)


def test_each_sample_has_its_own_kept_frames():
    x, reference = torch.zeros(2, 1, 3, 1, 1), torch.ones(2, 1, 3, 1, 1)
    out = fade_change(x, reference, torch.tensor([[True, False, False], [False, False, True]]), 1)
    assert out[:, 0, :, 0, 0].tolist() == [[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]
