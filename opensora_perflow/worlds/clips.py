"""Small real video clips: a coloured shape moving over a plain dark background, with a caption in words.

`make_clip` draws one clip in memory and alone decides what a caption looks like; the demo's teacher was trained on its clips.
`write_clips` saves them as mp4 files, with the CSV that Open-Sora's VariableVideoTextDataset reads. `read_clips` reads those
files, or any other folder of videos. `recognise` measures what a clip shows.

Frames are uint8 [T, H, W, 3], RGB, everywhere in this module. `frames_to_tensor` and `tensor_to_frames` go to and from the
[-1, 1], channels-first tensors that a VAE takes.
"""

import csv
import itertools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from opensora_perflow.atomic import replacing
from opensora_perflow.worlds.captions import Caption, captions_of_folder, captions_of_table
from opensora_perflow.worlds.tables import read_table
from opensora_perflow.worlds.videos import FPS, VIDEO_SUFFIXES, find_files, read_video, unreadable, write_video

logger = logging.getLogger(__name__)

NUM_FRAMES, HEIGHT, WIDTH = 17, 64, 64
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
    aspect_ratio = height / width, resolution). Its paths are absolute, because the host opens them from its own working
    directory. Videos that were in the folder before stay there: pass the returned CSV, not the folder, to `read_clips` to read
    these clips alone.

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
    _write_table(folder / "clips.csv", rows)
    return folder / "clips.csv"


def name_folder(table: Path, folder: Path) -> None:
    """Let a table of `write_clips` name its clips in the folder that they will be moved to."""
    rows = [row.cells for row in read_table(table)]
    _write_table(table, [{**row, "path": str(folder / Path(row["path"]).name)} for row in rows])


def is_written(name: str) -> bool:
    """Whether a file's name is one that `write_clips` gives."""
    caption = re.sub(r"_\d{4,}\.mp4$", "", name).replace("_", " ")
    return name == "clips.csv" or (name.endswith(".mp4") and caption in {content.caption for content in contents()})


def _write_table(table: Path, rows: list[dict[str, Any]]) -> None:
    with replacing(table) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_clips(
    source: str | Path,
    *,
    num_frames: int = NUM_FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
    skip: Callable[[Path], bool] | None = None,
) -> ClipSet:
    """Read videos of any size and length and bring them all to one size, as `videos.read_video` does.

    A file that cannot be read is skipped: each is named in a warning and counted in a last one. A video with several
    captions is a clip for each.

    Args:
        source: A folder (its videos, subfolders included, in order of name), or a CSV. The CSV has the column path and, if
            there are captions, text; its relative paths are relative to the CSV. In a folder, captions come from its CSVs with
            the columns path and text, and from the file's name otherwise.
        num_frames, height, width: Wanted size.
        skip: Files and subfolders of a folder for which this is true are left out.

    Returns:
        ClipSet with frames uint8 [N, num_frames, height, width, 3].

    Raises:
        ValueError: no such folder or CSV, no video in it, or none that can be read.
    """
    source = Path(source)
    entries = _list_captions(source, skip)
    paths = list(dict.fromkeys(entry.path for entry in entries))
    read: dict[Path, tuple[np.ndarray, float]] = {}
    for path in tqdm(paths, desc="reading clips", unit="clip"):
        try:
            read[path] = read_video(path, num_frames, height, width)
        except unreadable() as error:
            logger.warning("skipped %s: %s: %s", path, type(error).__name__, error)
    if len(read) < len(paths):
        logger.warning("skipped %d of %d videos in %s, see above", len(paths) - len(read), len(paths), source)
    if not read:
        raise ValueError(
            f"none of the {len(paths)} videos in {source} can be read; files that ffmpeg reads are accepted: check "
            "one of them in a player, or use clips made by write_clips"
        )
    kept = [entry for entry in entries if entry.path in read]
    return ClipSet(
        np.stack([read[entry.path][0] for entry in kept]),
        [entry.text or _caption_from_name(entry.path) for entry in kept],
        [entry.path for entry in kept],
        [read[entry.path][1] for entry in kept],
    )


def frames_to_tensor(frames: np.ndarray) -> Tensor:
    """uint8 [..., T, H, W, 3] -> float32 [..., 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -4).float() / 127.5 - 1.0


def tensor_to_frames(video: Tensor) -> np.ndarray:
    """Any float [..., 3, T, H, W], clamped to [-1, 1] -> uint8 [..., T, H, W, 3]."""
    video = (video.detach().float().cpu().clamp(-1, 1) + 1.0) * 127.5
    return video.round().to(torch.uint8).movedim(-4, -1).contiguous().numpy()


def recognise(frames: np.ndarray) -> Content:
    """Measure what a demo clip shows, without a network.

    The shape is every pixel that differs from the background. Its color is the nearest of COLORS to the mean of its
    inner pixels. Its direction is the main axis of a straight-line fit to its centers. Its kind is the one whose part of
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


def _list_captions(source: Path, skip: Callable[[Path], bool] | None) -> list[Caption]:
    """(video, caption or "") of a folder or a CSV."""
    if source.is_file() and source.suffix.lower() == ".csv":
        return captions_of_table(source)
    if not source.is_dir():
        raise ValueError(f"{source} is neither a folder nor a CSV file; pass a folder of videos, or make one with write_clips")
    paths = find_files(source, VIDEO_SUFFIXES, skip)
    if not paths:
        raise ValueError(
            f"no video in {source}; files ending in {', '.join(VIDEO_SUFFIXES)} are accepted: put some there, or make "
            "them with write_clips"
        )
    return captions_of_folder(paths, find_files(source, (".csv",), skip))


def _caption_from_name(path: Path) -> str:
    words = [word for word in re.split(r"[\W_]+", path.stem) if word and not word.isdigit()]
    return " ".join(words).lower() or "a video"
