import torch

from opensora_perflow.method import guidance as g


def test_scale_one_is_the_conditional_prediction_and_zero_the_unconditional():
    cond, uncond = torch.randn(2, 3, 4)
    torch.testing.assert_close(g.classifier_free(cond, uncond, 1.0), cond)
    torch.testing.assert_close(g.classifier_free(cond, uncond, 0.0), uncond)


def test_three_branches_reduce_to_two_when_a_pair_agrees():
    full, image, none = torch.randn(3, 2, 5)
    torch.testing.assert_close(g.text_and_image(full, image, none, 1.0, 1.0), full)
    # Text makes no difference: only image guidance is left, and the other way round.
    torch.testing.assert_close(g.text_and_image(image, image, none, 9.0, 3.0), g.classifier_free(image, none, 3.0))
    torch.testing.assert_close(g.text_and_image(full, none, none, 9.0, 3.0), g.classifier_free(full, none, 9.0))


def test_oscillation_starts_after_the_forced_steps():
    assert [g.oscillating_scale(5.0, i, force_num=3) for i in range(7)] == [5, 5, 5, 1, 5, 1, 5]


def test_rescaling_fully_restores_the_standard_deviation():
    cond = torch.randn(2, 4, 3, 2, 2)
    guided = 3 * cond + 1
    restored = g.rescale_to_cond(guided, cond, strength=1.0)
    torch.testing.assert_close(restored.flatten(1).std(dim=1), cond.flatten(1).std(dim=1))


def test_image_scale_decays_over_steps_and_grows_over_frames():
    ramp = [g.image_scale_ramp(5.0, 1.0, step, 5, 3).flatten().tolist() for step in range(5)]
    assert ramp[0] == [1, 3, 5] and ramp[2] == [1, 2, 3] and ramp[4] == [1, 1, 1]
