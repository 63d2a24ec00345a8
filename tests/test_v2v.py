"""Open-Sora 1.3's image and video conditioning (mask_index) at few steps, with networks whose answers are known."""

import pytest
import torch
from networks import PROMPTS, sizes, text_encoder
from torch import nn

from opensora_perflow import PeRFlow

IMAGE_SCALE, TEXT_SCALE = 5.0, 3.0


class StraightToReference(nn.Module):
    """Draws every frame on a straight line to: the mean of its reference frames, plus the reference in a reference frame, plus
    the mean of its text. Euler steps are exact for it, at any number of them."""

    def __init__(self, tokens=10, channels=32):
        super().__init__()
        self.y_embedder = nn.Module()
        self.y_embedder.register_buffer("y_embedding", torch.randn(tokens, channels))
        self.y_embedder.uncond_prob = 0.1
        self.seen = []

    def forward(self, x, timestep, y, mask=None, cond=None, cond_mask=None, mask_index=None, y_null=None, **kwargs):
        self.seen.append(dict(x=x, timestep=timestep, cond=cond, cond_mask=cond_mask, mask_index=mask_index, y_null=y_null))
        data = cond + cond.sum(dim=2, keepdim=True) / len(mask_index) + y.mean(dim=(1, 2, 3))[:, None, None, None, None]
        out = (data - x) / (timestep / 1000)[:, None, None, None, None]
        return torch.cat([out, torch.zeros_like(out)], dim=1)


class ConstantVelocity(StraightToReference):
    def forward(self, x, timestep, y, mask=None, cond=None, cond_mask=None, mask_index=None, y_null=None, **kwargs):
        super().forward(x, timestep, y, mask, cond, cond_mask, mask_index, y_null)
        return torch.cat([torch.full_like(x, 0.5), torch.zeros_like(x)], dim=1)


def v2v(network, reference, mask_index, *, guidance=None, joint=None, **arguments):
    settings = dict(long_video=joint, **(dict(cfg_scale=TEXT_SCALE) if guidance is None else dict(guidance=guidance)))
    with torch.no_grad():
        return PeRFlow(num_sampling_steps=4, **settings).sample(
            network, text_encoder(network), torch.randn(2, 4, 5, 4, 4), PROMPTS, "cpu", additional_args=sizes(2),
            image_cfg_scale=IMAGE_SCALE, z_cond=reference, z_cond_mask=torch.zeros_like(reference), mask_index=mask_index,
            mask=None, progress=False, **arguments,
        )  # fmt: skip


def expected(network, reference, mask_index, image_scale, text_scale):
    head = torch.zeros_like(reference)
    head[:, :, mask_index] = reference[:, :, mask_index]
    encoder = text_encoder(network)
    text, null = encoder.encode(PROMPTS)["y"].mean(dim=(1, 2, 3)), encoder.null(2).mean(dim=(1, 2, 3))
    image = head + head.sum(dim=2, keepdim=True) / len(mask_index)
    return image_scale * image + (null + text_scale * (text - null))[:, None, None, None, None]


@pytest.mark.parametrize("use_sdedit", [False, True])
@pytest.mark.parametrize("mask_index", [[0], [0, 1], [0, 1, 2], [0, 4], [4]])
def test_four_steps_follow_text_and_reference_with_their_own_scales(mask_index, use_sdedit):
    # On straight lines to the data the fresh noise of SDEdit makes no difference. 1e-4: the scales amplify float32's 1e-7,
    # as does division by the last step's t = 0.25.
    network, reference = StraightToReference(), torch.randn(2, 4, 5, 4, 4)
    out = v2v(network, reference, mask_index, use_sdedit=use_sdedit)
    torch.testing.assert_close(out, expected(network, reference, mask_index, IMAGE_SCALE, TEXT_SCALE), atol=1e-4, rtol=0)
    assert [call["timestep"].tolist() for call in network.seen] == [[t] * 6 for t in (1000.0, 750.0, 500.0, 250.0)]


def test_folded_guidance_takes_one_branch_a_step():
    network, reference = StraightToReference(), torch.randn(2, 4, 5, 4, 4)
    out = v2v(network, reference, [0, 1], guidance=dict(mode="fixed", scale=7.0))
    torch.testing.assert_close(out, expected(network, reference, [0, 1], 1.0, 1.0), atol=1e-5, rtol=0)
    assert [len(call["x"]) for call in network.seen] == [2, 2, 2, 2]


def test_the_network_sees_the_head_of_the_video_and_nothing_else_of_it():
    network, reference = StraightToReference(), torch.randn(2, 4, 5, 4, 4)
    v2v(network, reference, [0, 1])
    head = torch.zeros_like(reference)
    head[:, :, :2] = reference[:, :, :2]
    marks = torch.zeros_like(reference)
    marks[:, :, :2] = 1.0
    for call in network.seen:
        assert call["mask_index"] == [0, 1] and len(call["y_null"]) == 6
        assert torch.equal(call["cond"], torch.cat([head, head, torch.zeros_like(head)]))
        assert torch.equal(call["cond_mask"], torch.cat([marks] * 3))


def test_sdedit_starts_every_step_from_the_noised_reference():
    # dx/dt = -0.5. Reference frames end 0.25 * 0.5 past the reference noised to t = 0.25 for the last step, whatever
    # happened before; the others move 0.5 from their noise. Algebra in float32.
    network, reference = ConstantVelocity(), torch.randn(2, 4, 5, 4, 4)
    torch.manual_seed(5)
    z, *noise = (torch.randn(2, 4, 5, 4, 4) for _ in range(5))
    torch.manual_seed(5)
    out = v2v(network, reference, [0, 1], use_sdedit=True)
    last = 0.75 * reference + 0.25 * noise[3] + 0.125
    torch.testing.assert_close(out[:, :, :2], last[:, :, :2], atol=1e-6, rtol=0)
    torch.testing.assert_close(out[:, :, 2:], z[:, :, 2:] + 0.5, atol=1e-6, rtol=0)
    for call, drawn, t in zip(network.seen, noise, (1.0, 0.75, 0.5, 0.25)):
        noised = ((1 - t) * reference + t * drawn)[:, :, :2]
        torch.testing.assert_close(call["x"].chunk(3)[0][:, :, :2], noised, atol=1e-6, rtol=0)


def test_joining_fades_the_difference_between_given_and_generated_reference_frames():
    network, reference = StraightToReference(), torch.randn(2, 4, 5, 4, 4)
    fixed = dict(mode="fixed", scale=7.0)
    out = v2v(network, reference, [0, 1], guidance=fixed, joint=dict(frames=2))
    plain = expected(network, reference, [0, 1], 1.0, 1.0)
    assert torch.equal(out[:, :, :2], reference[:, :, :2])
    difference = (reference - plain)[:, :, 1]
    torch.testing.assert_close(out[:, :, 2], plain[:, :, 2] + 2 / 3 * difference, atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, :, 3], plain[:, :, 3] + 1 / 3 * difference, atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, :, 4], plain[:, :, 4], atol=1e-5, rtol=0)


def test_loops_hand_the_last_frames_on():
    # v1.3's prep_ref_and_update_mask_in_loop: the last k latent frames become the first k of the next clip's reference.
    network, reference, k = StraightToReference(), torch.randn(2, 4, 5, 4, 4), 2
    for _ in range(3):
        clip = v2v(network, reference, [0, 1], guidance=dict(mode="fixed", scale=7.0))
        torch.testing.assert_close(clip, expected(network, reference, [0, 1], 1.0, 1.0), atol=1e-4, rtol=1e-5)
        reference = torch.zeros_like(clip)
        reference[:, :, :k] = clip[:, :, -k:]
