"""Packed latents of Open-Sora 2.0: their order, their sizes and the warp of time."""

import math

import pytest
import torch
from mmdit import LAYOUT, positions

from opensora_perflow.conventions import shift_time
from opensora_perflow.hosts.v2.tokens import Layout, alphas


@pytest.mark.parametrize("patch", [1, 2])
def test_pack_and_unpack_are_inverse(patch):
    latents = torch.randn(2, 3, 4, 2 * patch, 5 * patch)
    layout = Layout(4, 2, 5, patch)
    tokens = layout.pack(latents)
    assert tokens.shape == (2, 4 * 2 * 5, 3 * patch**2)
    assert torch.equal(layout.unpack(tokens), latents) and torch.equal(layout.pack(layout.unpack(tokens)), tokens)


def test_a_token_holds_a_patch_of_each_channel():
    """Contract 2: the pixels (0,0), (0,1), (1,0), (1,1) of channel 0, then those of channel 1; the next token is to the right,
    then below, then in the next frame."""
    latents = torch.arange(2 * 3 * 4 * 8).reshape(1, 2, 3, 4, 8)
    tokens = LAYOUT.pack(latents)[0]
    assert tokens[0].tolist() == [0, 1, 8, 9, 96, 97, 104, 105]
    assert [tokens[i, 0].item() for i in (1, 4, 8)] == [2, 16, 32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 2, 4), (33, 16, 16), (1, 257, 2)])
def test_sizes_come_from_the_positions(sizes, dtype):
    """bfloat16 holds every integer up to 256, the last row of 257."""
    layout = Layout(*sizes, patch=2)
    assert Layout.of(positions(layout).to(dtype), 2) == layout


def test_positions_that_are_no_grid_are_refused():
    with pytest.raises(ValueError, match="img_ids of 23 tokens end at frame 2, row 1, column 3, which is no full grid"):
        Layout.of(positions()[:, :23], 2)
    with pytest.raises(ValueError, match="at most 256 a side"):  # bfloat16 makes 300 of 299
        Layout.of(positions(Layout(1, 300, 1, 2)).bfloat16(), 2)


def test_alpha_is_the_sampler_s():
    """1 at 256 tokens a frame, 3 at 4096, linear between, times the root of the frames; flow_shift takes its place."""
    assert Layout(1, 16, 16, 2).alpha == pytest.approx(1, abs=1e-15)
    assert Layout(1, 64, 64, 2).alpha == pytest.approx(3, abs=1e-15)
    assert Layout(4, 32, 68, 1).alpha == pytest.approx(2 * 2, abs=1e-14)  # 2176 is the middle
    assert alphas(LAYOUT, 3.5, 2, "cpu").tolist() == [3.5, 3.5]
    assert alphas(LAYOUT, None, 2, "cpu").tolist() == [LAYOUT.alpha] * 2


@pytest.mark.parametrize(
    "sizes, alpha, edges",
    [
        ((33, 12, 21), 5.73, (0.945, 0.851, 0.656)),
        ((33, 36, 64), 11.87, (0.973, 0.922, 0.798)),
        ((1, 48, 48), 2.07, (0.861, 0.674, 0.408)),
    ],
    ids=["256px", "768px", "image"],
)
def test_edges_of_four_windows(sizes, alpha, edges):
    """Contract 3, measured with upstream's get_schedule(4)."""
    found = Layout(*sizes, patch=2).alpha
    assert found == pytest.approx(alpha, abs=5e-3)
    warped = shift_time(torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64), found)
    assert warped.tolist() == pytest.approx(edges, abs=5e-4)


def test_alpha_of_patch_one_is_not_that_of_training():
    """T40: 24 x 24 latents of 32 frames in patches of 1: train.py says 5.33 and the sampler 6.60, which windows follow."""
    assert Layout(32, 24, 24, 1).alpha == pytest.approx(6.60, abs=5e-3)
    assert Layout(32, 12, 12, 2).alpha == pytest.approx((1 + (144 - 256) * 2 / 3840) * math.sqrt(32))
