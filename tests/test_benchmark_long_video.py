import sys
from dataclasses import replace

import pytest
import torch
from long_video import Measured, main
from long_video_loops import FINE, Clips, clip_of, followed, following_clips, joined, loop_clips, rows
from long_video_worlds import SHARED, SceneWorld
from torch import Tensor

JOINT = dict(edit=0.75, frames=2)


class Coded(SceneWorld):
    """The scenes with a codec that is exact, or one that adds a constant."""

    has_codec, fine_steps = True, (4, 4)

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def reencoded(self, latents: Tensor) -> Tensor:
        return latents + self.error


def looped(world, name, loops=4):
    chosen = {row.name: row for row in rows(world, JOINT)}[name]
    noise = torch.randn(loops, 6, 8, world.num_frames, 1, 1, generator=torch.Generator().manual_seed(0))
    return loop_clips(world, world.teacher, chosen, noise, world.prompts(6), seed=0)


def test_a_reencoded_hand_over_by_an_exact_codec_is_the_plain_one():
    plain = looped(Coded(0.0), "ours, 4 steps")
    assert torch.equal(looped(Coded(0.0), "ours, 4 steps, re-encoded"), plain)
    inexact = looped(Coded(0.5), "ours, 4 steps, re-encoded")
    assert torch.equal(inexact[0], plain[0])
    # What is handed over is the last frames once decoded and encoded; they stay as given.
    assert torch.equal(inexact[1][:, :, :SHARED], plain[0][:, :, -SHARED:] + 0.5)


def test_a_world_without_a_codec_has_no_reencoded_row():
    assert [row.name for row in rows(SceneWorld(), JOINT) if row.reencoded] == []


def test_loops_hand_over_their_last_frames_and_clips_join_without_them():
    clips = looped(Coded(0.0), "ours, 4 steps")
    for before, after in zip(clips, clips[1:]):
        assert torch.equal(after[:, :, :SHARED], before[:, :, -SHARED:])
    video = joined(clips)
    assert video.shape[2] == 6 + 3 * 4 and torch.equal(video[:, :, 6:10], clips[1][:, :, SHARED:])


@torch.no_grad()
def test_the_converged_teacher_is_where_rflow_leads_with_many_steps():
    world = SceneWorld()
    z, mask = torch.randn(8, 8, 6, 1, 1, generator=torch.Generator().manual_seed(0)), torch.ones(8, 6)
    mask[4:, :SHARED] = 0.0
    fine, host = rows(world, JOINT)[:2]
    errors = []
    for steps in (64, 128):
        many = replace(host, settings=dict(host.settings, num_sampling_steps=steps))
        ends = clip_of(world, world.teacher, many, world.prompts(8), z, mask)
        errors.append((ends - clip_of(world, world.teacher, fine, world.prompts(8), z, mask)).square().mean().sqrt().item())
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.25)  # Euler's error halves towards it; the rest is of order two


def test_measures_of_the_teacher_itself_and_of_a_shift_are_known():
    fine = torch.randn(4, 10, 8, 6, 1, 1, generator=torch.Generator().manual_seed(0))
    own, moved = Clips(fine, fine[followed(4)]), fine.clone()
    moved[1:] += 3.0
    found = Measured(replace(own, own=moved), fine, fine, seed=0).figures(4)
    assert found["teacher_first"].value == found["real_first"].value == 0.0
    assert found["teacher_later"].value == found["real_later"].value > 1.0
    same = Measured(own, fine, fine, seed=0).figures(3)
    assert {key for key, one in same.items() if one.value == 0.0} == {
        "teacher_first", "teacher_later", "real_first", "real_later", "pair_first", "pair_later", "following",
    }  # fmt: skip


def test_the_paired_distance_is_that_of_new_frames_and_of_the_loops_asked_for():
    fine = torch.zeros(8, 10, 8, 6, 1, 1)
    following = fine[followed(8)].clone()  # loops 2, 5, 8
    following[:, :, :, :SHARED] += 3.0
    following[2, :, :, SHARED:] += 2.0
    measured = Measured(Clips(fine + 1.0, following), fine, fine, seed=0)
    found = measured.following(8)
    assert found["pair_first"].value == 1.0
    assert found["pair_later"].value.item() == pytest.approx((4 / 3) ** 0.5)  # float32
    assert measured.following(7)["pair_later"].value == 0.0


def test_clips_that_follow_the_converged_teachers_are_its_own_where_it_makes_them():
    world = Coded(0.0)
    fine, ours = looped(world, FINE), looped(world, "ours, 4 steps")

    def following(name, fine):
        chosen = {row.name: row for row in rows(world, JOINT)}[name]
        noise = torch.randn(4, 6, 8, world.num_frames, 1, 1, generator=torch.Generator().manual_seed(0))
        return following_clips(world, world.teacher, chosen, noise, world.prompts(6), fine, seed=0)

    assert torch.allclose(following(FINE, fine), fine[[1]], atol=1e-5)  # float32, another batch
    assert torch.allclose(following("ours, 4 steps", ours), ours[[1]], atol=1e-5)
    assert torch.equal(following("ours, 4 steps", fine)[0][:, :, :SHARED], fine[0][:, :, -SHARED:])


def test_too_few_loops_for_a_drift_are_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["long_video.py", "--loops", "2", "8", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main()
    assert "--loops 2: drift compares" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_one_command_writes_tables_of_every_number_of_loops(tmp_path, monkeypatch):
    monkeypatch.setattr(SceneWorld, "fine_steps", (2, 2))
    small = ["--samples", "4", "--iterations", "2", "--seeds", "0", "--noise-seeds", "0", "1"]
    monkeypatch.setattr(
        sys, "argv", ["long_video.py", "--parts", "scenes", "--loops", "3", "4", *small, "--out", str(tmp_path)]
    )
    main()
    text = (tmp_path / "long_video.md").read_text()
    assert text.count("3 loops, seeds [0], noise [0, 1]") == 1 == text.count("4 loops, seeds [0]")
    assert text.count("| ours, 4 steps | 4 |") == 4  # two tables of each
    assert f"| {FINE} | 8 | 0.00 (0.00 to 0.00) | 0.00 (0.00 to 0.00) |" in text
    assert {"long_video.json", "long_video.md", "long_video.png"} <= {path.name for path in tmp_path.iterdir()}
