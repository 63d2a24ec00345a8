"""Training sets of captions alone, for starts="student": Open-Sora's scripts get blank videos of the sizes asked for.

Importing this module registers "perflow_captions" in the host's DATASETS (Open-Sora 1.1 to 1.3):

    custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.captions"], allow_failed_imports=False)
    dataset = dict(type="perflow_captions", num_frames=51, image_size=(240, 426))
    scheduler = dict(type="perflow", draws=dict(starts="student"), ...)

The table (--data-path) needs a column `text`; `num_frames`, `height` and `width` are used where it has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

try:
    from opensora.datasets.datasets import VariableVideoTextDataset
    from opensora.registry import DATASETS
except ImportError as error:
    raise ImportError(
        "opensora_perflow.hosts.captions registers a training set in Open-Sora's DATASETS, and the package `opensora` could "
        f"not be imported ({error}); run the script through `python -m opensora_perflow.run ROOT/scripts/train.py`, or put "
        "the checkout of hpcaitech/Open-Sora on PYTHONPATH"
    ) from error


@DATASETS.register_module("perflow_captions")
class Captions(VariableVideoTextDataset):
    """Captions with blank videos. The host's buckets decide on the sizes, as for videos.

    Args:
        data_path: Table of captions (CSV, JSON, parquet: what the host's read_file takes).
        num_frames: Frames of every video where the table has no such column, >= 1; the host's buckets take videos longer
            than theirs.
        image_size: (height, width) in pixels, likewise.
        fps: What the network is told, > 0.
        others: As the host's VariableVideoTextDataset (v1.3 passes tokenize_fn).

    Raises:
        ValueError: no column `text`, or sizes neither in the table nor given.
    """

    def __init__(
        self,
        data_path: str | None = None,
        num_frames: int | None = None,
        image_size: Sequence[int | None] = (None, None),
        fps: float = 24,
        **others: Any,
    ) -> None:
        super().__init__(data_path, num_frames=num_frames, image_size=tuple(image_size), **others)
        if "text" not in self.data.columns:
            raise ValueError(f"perflow_captions needs a column 'text' in {data_path!r}, got {list(self.data.columns)}")
        given = {"num_frames": num_frames, "height": image_size[0], "width": image_size[1]}
        missing = [name for name, value in given.items() if name not in self.data.columns and value is None]
        if missing:
            raise ValueError(
                f"perflow_captions needs the size of its videos: {data_path!r} has no column {', '.join(missing)}; add "
                "dataset=dict(num_frames=51, image_size=(240, 426)), or the columns"
            )
        for name, value in given.items():
            if name not in self.data.columns:
                self.data[name] = value
        self.fps = fps

    def getitem(self, index: str) -> dict[str, Any]:
        """The sample "row-frames-height-width": what the host's getitem returns, with zeros for the video [3, T, H, W]."""
        row, num_frames, height, width = (int(value) for value in index.split("-"))
        text = self.data.iloc[row]["text"]
        sample = {
            "video": torch.zeros(3, num_frames, height, width),
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "ar": height / width,
            "fps": 120 if num_frames == 1 else self.fps,  # the host's IMG_FPS
            "text": text,
            "path": f"caption {row}",  # v1.3's train.py takes it out of every batch
        }
        if getattr(self, "tokenize_fn", None) is not None:
            sample.update({key: value.squeeze(0) for key, value in self.tokenize_fn(text).items()})
        return sample

    def get_path(self, index: str) -> str:
        """What v1.3's messages call a sample."""
        return f"caption {index}"


__all__ = ["Captions"]
