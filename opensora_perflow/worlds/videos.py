"""One video file: read it as a player shows it, or write it. Frames are uint8 [T, H, W, 3], RGB."""

import os
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opensora_perflow.atomic import replacing

FPS = 8
"""Frame rate of the demo's clips, and of files that name none."""
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".gif")
# Most frames held while a video is read; a longer one is thinned evenly in time, so memory does not grow with length.
_MAX_HELD_FRAMES = 1024


def find_files(folder: Path, suffixes: tuple[str, ...], skip: Callable[[Path], bool] | None = None) -> list[Path]:
    """Files of a folder and its subfolders with one of the suffixes (lower case), in order of path.

    Files and subfolders for which `skip` is true are left out. So are hidden ones: macOS writes a hidden `._clip.mp4`
    beside each clip on other file systems.
    """

    def is_shown(path: Path) -> bool:
        return not path.name.startswith(".") and not (skip is not None and skip(path))

    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if is_shown(Path(parent, name))]
        found += [Path(parent, name) for name in names if Path(name).suffix.lower() in suffixes]
    return sorted(path for path in found if is_shown(path) and path.is_file())


def read_video(path: str | Path, num_frames: int, height: int, width: int) -> tuple[np.ndarray, float]:
    """Frames as a player shows them: turned by the display matrix, in their pixel aspect ratio, evenly in time.

    A frame counts as shown from half a usual frame before its time on, until the next one is. Every frame is scaled until
    it covers height x width, and cropped at the center.

    Args:
        path: Of the file.
        num_frames: Frames to take from the first to the last; a shorter video repeats some.
        height, width: Wanted size in pixels.

    Returns:
        (frames uint8 [num_frames, height, width, 3], mean frame rate in 1/s).

    Raises:
        ValueError: no picture in the file. PyAV's own errors pass through, see `unreadable`.
    """
    import av

    # PyAV takes what stands before a colon for a protocol, unless the path is absolute.
    with av.open(os.path.abspath(path)) as container:
        stream = _picture_stream(container)
        stream.thread_type = "AUTO"
        fps = float(stream.average_rate or FPS) or FPS
        timed = _thinned(_images(container, stream, fps, height, width))
    if not timed:
        raise ValueError("no frame in it")
    times = np.array([time for time, _ in timed])
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    wanted = np.linspace(times[0], times[-1], num_frames) + usual * (0.5 - 1e-6)
    take = np.searchsorted(times, wanted, side="right") - 1
    return np.stack([timed[index][1] for index in take]), fps


def unreadable() -> tuple[type[Exception], ...]:
    """What `read_video` raises for files that are no readable video."""
    import av

    return (av.error.FFmpegError, OSError, ValueError)


def write_video(path: str | Path, frames: np.ndarray, *, fps: float = FPS) -> Path:
    """Save frames as a video; H.264 where the encoder is there, else MPEG-4.

    The file appears under its name only when it is complete: it is written under a temporary name beside it first.

    Args:
        path: Of the file; its suffix names the container (.mp4).
        frames: uint8 [T, H, W, 3], T >= 1, H and W even (the encoders halve the colour resolution).
        fps: Frames per second, > 0.

    Returns:
        `path`.

    Raises:
        ValueError: another shape or type, an odd side, or fps <= 0.
    """
    import av

    path, frames = Path(path), np.asarray(frames)
    if frames.ndim != 4 or frames.shape[0] < 1 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"frames must be uint8 [T >= 1, H, W, 3], got {frames.dtype} {list(frames.shape)}; "
            "tensor_to_frames makes them from a decoded video"
        )
    if frames.shape[1] % 2 or frames.shape[2] % 2 or fps <= 0:
        raise ValueError(
            f"height and width must be even and fps > 0, got {frames.shape[1]}x{frames.shape[2]} at {fps}; crop a "
            "row or a column"
        )
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, av.open(os.path.abspath(temporary), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": "12", "preset": "fast"} if codec == "libx264" else {"qscale": "2"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


class _Turn(NamedTuple):
    """How a player turns a coded frame: swap its sides first, then mirror left-right, then top-bottom."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False


def _turn(frame: Any, default: _Turn) -> _Turn:
    """The turn that a frame's display matrix asks for; the nearest quarter turn."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return default
    # Coded (x, y) is shown at (a x + c y, b x + d y) with y downwards, in 16.16 fixed point (ISO 14496-12, tkhd).
    a, b, _, c, d = struct.unpack("=9i", bytes(data)[:36])[:5]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _Turn(False, a < 0, d < 0)
    return _Turn(True, c < 0, b < 0)


def _picture_stream(container: Any) -> Any:
    """The first video stream that is not a cover picture."""
    if not container.streams.video:
        raise ValueError("no video stream in it")
    covers = [str(getattr(stream, "disposition", "")) for stream in container.streams.video]
    films = [stream for stream, cover in zip(container.streams.video, covers) if "attached_pic" not in cover]
    return (films or list(container.streams.video))[0]


def _images(container: Any, stream: Any, fps: float, height: int, width: int) -> Iterator[tuple[float, np.ndarray]]:
    """(time in seconds, uint8 [height, width, 3]) of each frame; times rise strictly, whatever the file says."""
    turn, pixel_aspect, last = _Turn(), float(stream.sample_aspect_ratio or 1), -np.inf
    for frame in container.decode(stream):
        turn = _turn(frame, turn)
        time = frame.time if frame.time is not None else -np.inf
        last = time if time > last else max(last + 1 / fps, 0.0)
        yield last, _covering(frame, turn, pixel_aspect, height, width)


def _covering(frame: Any, turn: _Turn, pixel_aspect: float, height: int, width: int) -> np.ndarray:
    """The frame as shown, scaled until it covers height x width, and its center."""
    if turn.transpose:
        height, width = width, height
    shown_width = frame.width * pixel_aspect
    scale = max(height / frame.height, width / shown_width)
    new_height, new_width = max(height, round(frame.height * scale)), max(width, round(shown_width * scale))
    image = frame.reformat(new_width, new_height, format="rgb24", interpolation="AREA").to_ndarray()
    top, left = (new_height - height) // 2, (new_width - width) // 2
    image = image[top : top + height, left : left + width]
    image = image.swapaxes(0, 1) if turn.transpose else image
    return np.ascontiguousarray(image[:: -1 if turn.mirror_y else 1, :: -1 if turn.mirror_x else 1])


def _thinned(timed: Iterator[tuple[float, np.ndarray]]) -> list[tuple[float, np.ndarray]]:
    """At most `_MAX_HELD_FRAMES` frames, evenly in time, and the last one always."""
    held: list[tuple[float, np.ndarray]] = []
    gap, last = 0.0, None
    for last in timed:
        if held and last[0] - held[-1][0] < gap:
            continue
        held.append(last)
        if len(held) > _MAX_HELD_FRAMES:
            # Frames nearer than twice the mean distance go: about half of them where the rate is even.
            gap = max(2 * gap, (held[-1][0] - held[0][0]) * 2 / _MAX_HELD_FRAMES) * (1 - 1e-9)
            kept = held[:1]
            for one in held[1:]:
                if one[0] - kept[-1][0] >= gap:
                    kept.append(one)
            held = kept
    if last is not None and held[-1] is not last:
        held.append(last)
    return held
