import pytest
import torch
from networks import sizes

from opensora_perflow.conventions import shift_time
from opensora_perflow.hosts.v1.timestep_transform import installed_formula, shift_ratio


def args(height, width, num_frames, dtype=torch.float32):
    return {
        k: torch.tensor([float(v)], dtype=dtype) for k, v in dict(height=height, width=width, num_frames=num_frames).items()
    }


@pytest.mark.parametrize("formula, frames, expected", [("v1.2", 102, 939.0), ("v1.3", 97, 932.3)])
def test_known_values_at_360p(formula, frames, expected):
    # 750 of 1000 at 360 x 640, as upstream's own function gives it (measured on its checkouts).
    ratio = shift_ratio(args(360, 640, frames), formula)
    assert shift_time(torch.tensor(0.75, dtype=torch.float64), ratio).item() * 1000 == pytest.approx(expected, abs=0.05)


def test_latent_frames_are_counted_as_each_version_does():
    base = args(512, 512, 34)
    assert shift_ratio(base, "v1.2").item() == pytest.approx(10**0.5)  # 34 // 17 * 5
    assert shift_ratio(base, "v1.3").item() == pytest.approx(8**0.5)  # (34 - 1) // 4
    assert shift_ratio(args(512, 512, 1), "v1.2").item() == shift_ratio(args(512, 512, 1), "v1.3").item() == 1.0


def test_scale_applies_to_images_under_v12_only():
    image, video = args(512, 512, 1), args(512, 512, 17)
    assert shift_ratio(image, "v1.2", scale=2.0).item() == 2.0
    assert shift_ratio(image, "v1.3", scale=2.0).item() == 1.0
    assert shift_ratio(video, "v1.3", scale=2.0).item() == pytest.approx(4.0)  # (17 - 1) // 4 = 4 latent frames
    assert shift_ratio(video, "v1.3", scale=2.0, scale_temporal=False).item() == 1.0


def test_half_precision_sizes_do_not_overflow_and_nothing_is_changed():
    given = args(720, 1280, 17, torch.float16)
    assert torch.isfinite(shift_ratio(given, "v1.2")).all()
    assert all(value.dtype == torch.float16 for value in given.values())


@pytest.mark.parametrize("formula, frames, least", [("v1.2", 16, 17), ("v1.3", 4, 5)])
def test_videos_without_a_latent_frame_are_refused(formula, frames, least):
    with pytest.raises(ValueError, match=f"no latent frame in a video of {frames} frames; use at least {least}"):
        shift_ratio(args(64, 64, frames), formula)


def test_missing_sizes_are_named():
    given = sizes(1)
    del given["height"]
    with pytest.raises(ValueError, match='missing: height; .*multi_resolution="STDiT2"'):
        shift_ratio(given, "v1.2")


def test_without_a_host_the_formula_is_v12(monkeypatch):
    monkeypatch.setattr("opensora_perflow.hosts.v1.timestep_transform.find_spec", lambda name: None)
    assert installed_formula() == "v1.2"
