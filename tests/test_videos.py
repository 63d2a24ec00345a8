"""Odd video files: each is read as a player shows it."""

from __future__ import annotations

import logging
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from opensora_perflow.worlds import videos
from opensora_perflow.worlds.clips import read_clips

COLORS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 200, 30), "white": (255, 255, 255)}


def flag(height: int = 96, width: int = 160) -> np.ndarray:
    """Red on the left, blue at the top right, green at the bottom right: no turn or mirror image looks like it."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, : width // 2] = COLORS["red"]
    frame[: height // 2, width // 2 :] = COLORS["blue"]
    frame[height // 2 :, width // 2 :] = COLORS["green"]
    return frame


def grey(level: int) -> np.ndarray:
    return np.full((32, 32, 3), level, np.uint8)


def encode(path: Path, frames: list[np.ndarray], *, milliseconds: list[int] | None = None, aspect: int = 1) -> Path:
    """Write frames at given times; `aspect` is the width of a pixel in heights."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Write a display matrix into an mp4's track header, as phones do."""
    data = bytearray(path.read_bytes())
    start = data.find(b"tkhd") + 4
    start += 4 + (32 if data[start] else 20) + 16
    data[start : start + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def color_names(frame: np.ndarray) -> list[str]:
    """Colors in the middle of the four quarters, row by row."""
    height, width = frame.shape[:2]
    pixels = [frame[y * height // 4, x * width // 4].astype(int) for y in (1, 3) for x in (1, 3)]
    return [min(COLORS, key=lambda name: np.abs(np.array(COLORS[name]) - pixel).sum()) for pixel in pixels]


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda frame: frame),
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
        ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
        ((0, 1, 1, 0), lambda frame: frame.swapaxes(0, 1)),
    ],
    ids=["upright", "90", "180", "270", "mirrored", "transposed"],
)
def test_a_clip_comes_turned_as_its_display_matrix_says(tmp_path, matrix, shown):
    set_display_matrix(encode(tmp_path / "x.mp4", [flag()] * 3), *matrix)
    expected = shown(flag())
    found, _ = videos.read_video(tmp_path / "x.mp4", 2, *expected.shape[:2])
    assert found.shape == (2, *expected.shape)
    assert color_names(found[0]) == color_names(expected)


def test_wide_pixels_are_shown_wide(tmp_path):
    encode(tmp_path / "x.mp4", [flag(96, 80)] * 3, aspect=2)
    found, _ = videos.read_video(tmp_path / "x.mp4", 1, 96, 160)  # as high as the file, twice as wide: nothing is cropped
    row = found[0][24].astype(int)
    assert abs(int(np.argmax(np.abs(row - COLORS["blue"]).sum(axis=1) < 120)) - 80) <= 2


def test_wide_pixels_of_a_turned_clip_become_high(tmp_path):
    set_display_matrix(encode(tmp_path / "x.mp4", [flag(96, 80)] * 3, aspect=2), 0, 1, -1, 0)
    found, _ = videos.read_video(tmp_path / "x.mp4", 1, 160, 96)
    assert color_names(found[0]) == color_names(np.rot90(flag(), -1))


def test_frames_are_taken_evenly_in_time(tmp_path):
    """A second at 10 frames a second, then three at 2: slow motion as phones write it."""
    times = [*range(0, 1000, 100), *range(1000, 4001, 500)]
    encode(tmp_path / "x.mp4", [grey(20 + time // 20) for time in times], milliseconds=times)
    found, _ = videos.read_video(tmp_path / "x.mp4", 9, 32, 32)
    levels = found.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, [20 + 25 * k for k in range(9)], atol=5)  # every 500 ms


def test_a_frame_stays_until_the_next_one(tmp_path):
    """A screen recording writes a frame where something changes: at half time the first one is still shown."""
    encode(tmp_path / "x.mp4", [grey(50), grey(150), grey(200)], milliseconds=[0, 9000, 10000])
    found, _ = videos.read_video(tmp_path / "x.mp4", 3, 32, 32)
    np.testing.assert_allclose(found.mean(axis=(1, 2, 3)), [50, 50, 200], atol=5)


def test_a_long_clip_of_uneven_rate_is_thinned_in_time(tmp_path, monkeypatch):
    times = [*range(0, 2000, 20), *range(2000, 4001, 100)]
    encode(tmp_path / "x.mp4", [grey(20 + time // 20) for time in times], milliseconds=times)
    monkeypatch.setattr(videos, "_MAX_HELD_FRAMES", 40)
    found, _ = videos.read_video(tmp_path / "x.mp4", 5, 32, 32)
    np.testing.assert_allclose(found.mean(axis=(1, 2, 3)), [20, 70, 120, 170, 220], atol=8)


def test_a_relative_folder_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run-10:30").mkdir()
    videos.write_video("run-10:30/x.mp4", np.stack([grey(90)] * 3))
    assert read_clips("run-10:30", num_frames=3).captions == ["x"]


def test_hidden_files_are_no_clips(tmp_path, caplog):
    encode(tmp_path / "x.mp4", [grey(90)] * 3)
    (tmp_path / "._x.mp4").write_bytes(b"what macOS writes beside a file")
    (tmp_path / ".trash").mkdir()
    encode(tmp_path / ".trash" / "y.mp4", [grey(90)] * 3)
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in read_clips(tmp_path).paths] == ["x.mp4"]
    assert not caplog.records
