"""Small real video clips: a coloured shape moving over a plain dark background, with a caption in words.

`make_clip` draws one clip in memory and is the single source of truth for what a caption looks like: `write_clips`
saves its clips as mp4 files with the CSV that Open-Sora's VariableVideoTextDataset reads, and the demo's teacher was
trained on it. `read_clips` reads those files, or any other folder of videos. `recognise` measures what a clip shows.

Frames are uint8 [T, H, W, 3], RGB, everywhere in this module; `frames_to_tensor` and `tensor_to_frames` go to and from
the [-1, 1], channels-first tensors that a VAE takes.
"""

from __future__ import annotations

import csv
import itertools
import logging
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from opensora_perflow.atomic import replacing

logger = logging.getLogger(__name__)

NUM_FRAMES, HEIGHT, WIDTH, FPS = 17, 64, 64, 8
BACKGROUND = (18, 18, 26)
COLORS = {
    "red": (232, 52, 48),
    "green": (52, 200, 84),
    "blue": (58, 104, 242),
    "yellow": (244, 210, 58),
    "purple": (184, 70, 222),
    "white": (236, 236, 236),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # (x, y), y downwards
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".gif")
# Longest run of frames held while a video is read; a longer one is thinned evenly, so memory does not grow with length.
_MAX_HELD_FRAMES = 1024


class Content(NamedTuple):
    """What a clip shows; each part is a key of COLORS, SHAPES or DIRECTIONS ("none" where nothing is recognised)."""

    color: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape} moving {self.direction}"


@dataclass(frozen=True)
class ClipSet:
    """Clips as read: frames uint8 [N, T, H, W, 3], and a caption, a path and a frame rate (1/s) for each of the N."""

    frames: np.ndarray
    captions: list[str]
    paths: list[Path]
    fps: list[float]

    def __len__(self) -> int:
        return len(self.captions)


def contents() -> list[Content]:
    """Every combination of color, shape and direction, in a fixed order (72 of them)."""
    return [Content(*parts) for parts in itertools.product(COLORS, SHAPES, DIRECTIONS)]


def make_clip(
    seed: int | np.random.Generator,
    content: Content | None = None,
    *,
    num_frames: int = NUM_FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
) -> tuple[np.ndarray, str]:
    """Draw one clip; size, starting place and speed of the shape are random, and it crosses about half the frame.

    Args:
        seed: An int (always the same clip) or a generator (the next clip).
        content: What to show; None draws each part uniformly.
        num_frames, height, width: Of the clip; at least 1, 16 and 16.

    Returns:
        (frames uint8 [T, H, W, 3], caption).

    Raises:
        ValueError: a size below the least one, or a content that is not among `contents()`.
    """
    if num_frames < 1 or min(height, width) < 16:
        raise ValueError(
            f"a clip needs num_frames >= 1 and height, width >= 16, got {num_frames}, {height}, {width}; "
            f"the demo uses {NUM_FRAMES}, {HEIGHT}, {WIDTH}"
        )
    rng = np.random.default_rng(seed)
    if content is None:
        content = Content(*(str(rng.choice(list(names))) for names in (COLORS, SHAPES, DIRECTIONS)))
    if content.color not in COLORS or content.shape not in SHAPES or content.direction not in DIRECTIONS:
        raise ValueError(
            f"unknown content {tuple(content)}; colors are {list(COLORS)}, shapes {list(SHAPES)}, directions {list(DIRECTIONS)}"
        )
    side = min(height, width)
    radius = side * rng.uniform(0.15, 0.19)
    heading = np.array(DIRECTIONS[content.direction])
    size = np.array([width, height], dtype=np.float64)
    # the whole path stays inside the frame; 1.5 pixels are the anti-aliased outline at the tip of a triangle
    free = size - 2 * (radius + 1.5)
    travel = np.abs(heading) * free * rng.uniform(0.68, 0.84)
    margin = radius + 1.5 + travel / 2
    middle = margin + rng.uniform(size=2) * (size - 2 * margin)
    progress = np.linspace(-0.5, 0.5, num_frames) if num_frames > 1 else np.zeros(1)
    centers = middle + progress[:, None] * heading * travel  # [T, 2]
    return draw_shape(content.color, content.shape, centers, radius, height=height, width=width), content.caption


def draw_shape(
    color: str, shape: str, centers: np.ndarray, radius: float, *, height: int = HEIGHT, width: int = WIDTH
) -> np.ndarray:
    """Draw a shape at a center in each frame.

    Args:
        color, shape: Keys of COLORS and SHAPES.
        centers: (x, y) in pixels, [T, 2], y downwards.
        radius: Half the shape's size in pixels.
        height, width: Of the frames.

    Returns:
        Frames, uint8 [T, H, W, 3].
    """
    y, x = np.mgrid[:height, :width] + 0.5
    distance = _signed_distance(shape, x[None] - centers[:, 0, None, None], y[None] - centers[:, 1, None, None], radius)
    coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]  # one pixel of anti-aliasing at the outline
    frames = coverage * np.array(COLORS[color]) + (1 - coverage) * np.array(BACKGROUND)
    return np.rint(frames).astype(np.uint8)


def write_clips(
    folder: str | Path,
    num_clips: int,
    seed: int = 0,
    *,
    num_frames: int = NUM_FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
    fps: int = FPS,
) -> Path:
    """Write `num_clips` mp4 files and `clips.csv`; contents are spread evenly over all combinations.

    The CSV has the columns that the host's VariableVideoTextDataset reads (path, text, num_frames, height, width, fps,
    aspect_ratio = height / width, resolution); its paths are absolute, because the host opens them from its own working
    directory. Videos that were in the folder before stay there: pass the returned CSV, not the folder, to `read_clips`
    to read these clips alone.

    Returns:
        Path of the CSV.

    Raises:
        ValueError: num_clips < 1, or a size that `make_clip` or `write_video` refuses.
    """
    if num_clips < 1:
        raise ValueError(f"num_clips must be at least 1, got {num_clips}; 64 are plenty for the demo")
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    deck: list[Content] = []
    rows = []
    for index in tqdm(range(num_clips), desc="writing clips", unit="clip"):
        if not deck:
            deck = [contents()[place] for place in rng.permutation(len(contents()))]
        frames, caption = make_clip(rng, deck.pop(), num_frames=num_frames, height=height, width=width)
        path = folder / f"{caption.replace(' ', '_')}_{index:04d}.mp4"
        write_video(path, frames, fps=fps)
        rows.append(
            {
                "path": str(path),
                "text": caption,
                "num_frames": num_frames,
                "height": height,
                "width": width,
                "fps": fps,
                "aspect_ratio": round(height / width, 4),
                "resolution": height * width,
            }
        )
    with replacing(folder / "clips.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "clips.csv"


def read_clips(
    source: str | Path,
    *,
    num_frames: int = NUM_FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
) -> ClipSet:
    """Read videos of any size and length and bring them all to one size.

    Every frame is scaled until it covers height x width and cropped at the center; `num_frames` frames are taken evenly
    from the first to the last (a shorter video repeats some). A file that cannot be read is skipped: each is named in a
    warning and counted in a last one.

    Args:
        source: A folder (its videos, subfolders included, in order of name), or a CSV with the column path and, if
            there are captions, text; relative paths are relative to the CSV. In a folder, captions come from a CSV
            with the columns path and text if there is one, and from the file's name otherwise.
        num_frames, height, width: Wanted size.

    Returns:
        ClipSet with frames uint8 [N, num_frames, height, width, 3].

    Raises:
        ValueError: no such folder or CSV, no video in it, or none that can be read.
    """
    source = Path(source)
    paths, captions = _list_videos(source)
    frames, kept_paths, kept_captions, rates = [], [], [], []
    for path in tqdm(paths, desc="reading clips", unit="clip"):
        try:
            clip, fps = _read_video(path, num_frames, height, width)
        except _unreadable() as error:
            logger.warning("skipped %s: %s: %s", path, type(error).__name__, error)
            continue
        frames.append(clip)
        kept_paths.append(path)
        kept_captions.append(captions.get(path) or _caption_from_name(path))
        rates.append(fps)
    if len(frames) < len(paths):
        logger.warning("skipped %d of %d videos in %s, see above", len(paths) - len(frames), len(paths), source)
    if not frames:
        raise ValueError(
            f"none of the {len(paths)} videos in {source} can be read; files that ffmpeg reads are accepted: check "
            "one of them in a player, or use clips made by write_clips"
        )
    return ClipSet(np.stack(frames), kept_captions, kept_paths, rates)


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
    with replacing(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": "12", "preset": "fast"} if codec == "libx264" else {"qscale": "2"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


def frames_to_tensor(frames: np.ndarray) -> Tensor:
    """uint8 [..., T, H, W, 3] -> float32 [..., 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -4).float() / 127.5 - 1.0


def tensor_to_frames(video: Tensor) -> np.ndarray:
    """Any float [..., 3, T, H, W], clamped to [-1, 1] -> uint8 [..., T, H, W, 3]."""
    video = (video.detach().float().cpu().clamp(-1, 1) + 1.0) * 127.5
    return video.round().to(torch.uint8).movedim(-4, -1).contiguous().numpy()


def recognise(frames: np.ndarray) -> Content:
    """Measure what a demo clip shows, without a network.

    The shape is every pixel that differs from the background; its color is the nearest of COLORS to the mean of its
    inner pixels, its direction the main axis of a straight-line fit to its centers, and its kind the one whose part of
    the bounding box (circle 0.79, square 1, triangle 0.5) is nearest, averaged over the frames.

    Args:
        frames: uint8 [T, H, W, 3] of the demo's kind.

    Returns:
        Content; a part that cannot be told (nothing there, or no motion) is "none".
    """
    pixels = frames.astype(np.float64)
    strength = np.linalg.norm(pixels - np.array(BACKGROUND), axis=-1) / 255.0  # [T, H, W]
    inside = strength > 0.25
    area = inside.sum(axis=(1, 2))
    seen = area > 0.01 * inside[0].size
    if seen.sum() < 2:
        return Content("none", "none", "none")
    bright = strength > 0.7 * np.quantile(strength[inside], 0.9)
    mean_color = pixels[bright].mean(axis=0)
    color = min(COLORS, key=lambda name: float(np.linalg.norm(mean_color - np.array(COLORS[name]))))

    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]]
    times = np.flatnonzero(seen)
    centers = np.array([(x[inside[k]].mean(), y[inside[k]].mean()) for k in times])
    velocity = np.polyfit(times, centers, 1)[0] * len(frames)  # pixels over the whole clip, (x, y)
    direction = "none"
    if np.abs(velocity).max() > 0.1 * min(frames.shape[1:3]):
        direction = max(DIRECTIONS, key=lambda name: float(np.dot(velocity, DIRECTIONS[name])))

    fill = []
    for k in times:
        rows, columns = np.flatnonzero(inside[k].any(axis=1)), np.flatnonzero(inside[k].any(axis=0))
        fill.append(area[k] / ((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)))
    expected = {"circle": 0.79, "square": 0.97, "triangle": 0.54}
    shape = min(SHAPES, key=lambda name: abs(expected[name] - float(np.mean(fill))))
    return Content(color, shape, direction)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Pixels from the outline, negative inside (near the outline exact enough for anti-aliasing)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    # upright triangle in the box |x|, |y| <= radius: one level edge, and two sloping ones through the top
    slope = np.array([2.0, 1.0]) / np.sqrt(5.0)
    return np.maximum(y - radius, np.abs(x) * slope[0] - (y + radius) * slope[1])


def _list_videos(source: Path) -> tuple[list[Path], dict[Path, str]]:
    """(videos, captions of those that have one) of a folder or a CSV."""
    if source.is_file() and source.suffix.lower() == ".csv":
        return _videos_of_table(source)
    if not source.is_dir():
        raise ValueError(f"{source} is neither a folder nor a CSV file; pass a folder of videos, or make one with write_clips")
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(
            f"no video in {source}; files ending in {', '.join(VIDEO_SUFFIXES)} are accepted: put some there, or make "
            "them with write_clips"
        )
    return paths, _captions_beside(source, paths)


def _videos_of_table(table: Path) -> tuple[list[Path], dict[Path, str]]:
    rows = _read_csv(table)
    if not rows or "path" not in rows[0]:
        raise ValueError(
            f"{table} names no videos; a CSV with a header line, the column path, and text for captions is "
            "accepted: write_clips makes one"
        )
    paths = [_resolve(table, row["path"]) for row in rows]
    return paths, {path: row.get("text") or "" for path, row in zip(paths, rows)}


def _captions_beside(folder: Path, paths: list[Path]) -> dict[Path, str]:
    """Captions from the first table in a folder that has some; empty without one."""
    for table in sorted(folder.glob("*.csv")):
        rows = _read_csv(table)
        if rows and {"path", "text"} <= rows[0].keys():
            # by name too: a folder that was moved still finds its captions
            by_path = {_resolve(table, row["path"]): row["text"] for row in rows}
            by_name = {Path(row["path"]).name: row["text"] for row in rows}
            return {path: by_path.get(path.resolve()) or by_name.get(path.name, "") for path in paths}
    return {}


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _resolve(table: Path, path: str) -> Path:
    return (table.parent / path).resolve()  # an absolute `path` wins over the folder


def _caption_from_name(path: Path) -> str:
    words = [word for word in re.split(r"[\W_]+", path.stem) if word and not word.isdigit()]
    return " ".join(words).lower() or "a video"


def _unreadable() -> tuple[type[Exception], ...]:
    import av

    return (av.error.FFmpegError, OSError, ValueError)


def _read_video(path: Path, num_frames: int, height: int, width: int) -> tuple[np.ndarray, float]:
    """(frames uint8 [num_frames, height, width, 3], frames per second)."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("no video stream in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        fps = float(stream.average_rate or FPS)
        held, stride = [], 1
        for index, frame in enumerate(container.decode(stream)):
            if index % stride:
                continue
            scale = max(height / frame.height, width / frame.width)
            new_height, new_width = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
            image = frame.reformat(new_width, new_height, format="rgb24", interpolation="AREA").to_ndarray()
            top, left = (new_height - height) // 2, (new_width - width) // 2
            held.append(image[top : top + height, left : left + width])
            if len(held) > _MAX_HELD_FRAMES:
                held, stride = held[::2], stride * 2
    if not held:
        raise ValueError("no frame in it")
    take = np.linspace(0, len(held) - 1, num_frames).round().astype(int)
    return np.stack([held[index] for index in take]), fps
