"""Pictures of the demo: clips beside each other, a grid of frames, and how training went."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from opensora_perflow.atomic import replacing
from opensora_perflow.tools.fonts import Label, as_label

TEACHER, STUDENT = "#8a8a8a", "#d1495b"


def side_by_side(videos: dict[str, np.ndarray], captions: Sequence[str | Label], scale: int = 3) -> np.ndarray:
    """One video that shows every sampler's clips in a row of its own, one column a caption.

    Args:
        videos: Label -> uint8 [N, T, H, W, 3], the same shape for all.
        captions: N captions; those of `fonts.labels` can be drawn in any script.
        scale: Each pixel becomes scale x scale.

    Returns:
        uint8 [T, height, width, 3], even sides.
    """
    first = next(iter(videos.values()))
    count, num_frames, height, width = first.shape[:4]
    figure = Figure(figsize=((count * width * scale + 190) / 100, (len(videos) * height * scale + 40) / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(videos), count, squeeze=False)
    left = 190 / (count * width * scale + 190)
    top = 1 - 36 / (len(videos) * height * scale + 40)
    figure.subplots_adjust(left, 0.005, 0.995, top, wspace=0.03, hspace=0.03)
    images = []
    for row, (label, clips) in zip(axes, videos.items()):
        row[0].text(-0.06, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=11)
        for axis, clip in zip(row, clips):
            axis.axis("off")
            images.append((axis.imshow(clip[0], interpolation="nearest"), clip))
    for axis, caption in zip(axes[0], map(as_label, captions)):
        axis.set_title(caption.text, fontsize=8, **caption.style)
    frames = []
    for i in range(num_frames):
        for image, clip in images:
            image.set_data(clip[i])
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    video = np.stack(frames)
    return video[:, : video.shape[1] // 2 * 2, : video.shape[2] // 2 * 2]


def frames_figure(path: Path, videos: dict[str, np.ndarray], captions: Sequence[str | Label], num_frames: int = 5) -> None:
    """Frames of a few clips as a grid: a block of rows for each caption, one row a sampler, time to the right."""
    clips = next(iter(videos.values()))
    shown = np.linspace(0, clips.shape[1] - 1, num_frames).round().astype(int)
    captions = captions[: len(clips)]
    figure = Figure(figsize=(2.0 + 1.2 * num_frames * len(captions) * 0.75, 1.0 * len(videos) + 0.5), dpi=110)
    # The first block is wider by the room for its labels, so that all frames come out the same size.
    ratios = [0.96 / 0.73] + [1.0] * (len(captions) - 1)
    blocks = figure.subfigures(1, len(captions), squeeze=False, wspace=0.02, width_ratios=ratios)[0]
    for n, (block, caption) in enumerate(zip(blocks, map(as_label, captions))):
        axes = block.subplots(len(videos), num_frames, squeeze=False)
        block.subplots_adjust(0.26 if n == 0 else 0.03, 0.02, 0.99, 0.86, wspace=0.04, hspace=0.04)
        block.suptitle(caption.text, fontsize=10, **caption.style)
        for row, (label, frames) in zip(axes, videos.items()):
            for axis, i in zip(row, shown):
                axis.axis("off")
                axis.imshow(frames[n][i], interpolation="nearest")
            if n == 0:
                row[0].text(-0.08, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=8)
    save_figure(figure, path)


def training_figure(path: Path, history: list[float], windows: list[dict[str, Any]]) -> None:
    """The loss over the training steps, and of one step across each window the error and the motion it leads to.

    windows: t_start, t_end, teacher, student (errors) and motion (the fields of `motion.WindowMotion`) of each.
    """
    figure = Figure(figsize=(13, 3.8), dpi=110, layout="constrained")
    left, right, last = figure.subplots(1, 3)
    left.plot(history, color=STUDENT, alpha=0.25, linewidth=1)
    width = max(1, min(20, len(history) // 4))
    smooth = np.convolve(history, np.ones(width) / width, mode="valid")
    left.plot(np.arange(width - 1, len(history)), smooth, color=STUDENT, label=f"mean of {width} steps")
    left.set(xlabel="training step", ylabel="PeRFlow loss", title="Training", yscale="log")
    for ticks in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        ticks(FuncFormatter(lambda value, _: f"{value:g}"))
    places = np.arange(len(windows))
    motions = [row["motion"] for row in windows]
    for axis, rows, of_teacher in (right, windows, "teacher, one guided Euler step"), (last, motions, "teacher"):
        axis.bar(places - 0.2, [row["teacher"] for row in rows], 0.38, color=TEACHER, label=of_teacher)
        axis.bar(places + 0.2, [row["student"] for row in rows], 0.38, color=STUDENT, label="student, one step")
        axis.set_xticks(places, [f"{row['t_start']:.2g} → {row['t_end']:.2g}" for row in windows], fontsize=8)
        axis.set(xlabel="window (t = 1 is noise)")
    for axis in (left, right, last):  # below, where no bar is
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize=9)
    right.set(ylabel="error at the window's end", title="One step across each window")
    last.set(ylabel="temporal-difference energy", title="Motion of the video it points at")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
