"""Training sets of captions alone, for starts="student": Open-Sora's scripts get blank videos of the sizes asked for.

Importing this module registers "perflow_captions" in the host's DATASETS (Open-Sora 1.1 to 1.3):

    custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.captions"], allow_failed_imports=False)
    dataset = dict(type="perflow_captions", num_frames=51, image_size=(240, 426))
    scheduler = dict(type="perflow", draws=dict(starts="student"), ...)

The table (--data-path) needs a column `text`; `num_frames`, `height` and `width` are used where it has them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from opensora_perflow.checks import as_number, check_num_steps, file_name
from opensora_perflow.hosts.script import running_config
from opensora_perflow.hosts.v1.encoded_text import read_latent_sizes
from opensora_perflow.worlds.tables import read_table

try:
    from opensora.datasets.datasets import VariableVideoTextDataset
    from opensora.registry import DATASETS
except ImportError as error:
    raise ImportError(
        "opensora_perflow.hosts.captions registers a training set in Open-Sora's DATASETS, and the package `opensora` could "
        f"not be imported ({error}); run the script through `python -m opensora_perflow.run ROOT/scripts/train.py`, or put "
        "the checkout of hpcaitech/Open-Sora on PYTHONPATH"
    ) from error


SIZES = ("num_frames", "height", "width")
MISSING = {"na", "n/a", "#n/a", "<na>", "nan", "-nan", "null", "none", "nil"}
"""Words that tables have where nothing is known, lower case."""


def _check_settings(data_path: Any, fps: Any, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            check_num_steps(value, f"{name} of perflow_captions")
    rate = as_number(fps)
    if rate is None or not 0 < rate < math.inf:
        what = "a number" if rate is None else "> 0 and finite"
        raise ValueError(f"fps of perflow_captions must be {what}, got {fps!r}; write for example fps=24")
    file_name("the table of captions (--data-path)")("data_path of perflow_captions", data_path)


def _check_latents(latents: str | None) -> None:
    config = running_config() or {}
    if config and (latents is not None) != bool(config.get("load_video_features")):
        raise ValueError(
            f"perflow_captions gives {'videos' if latents is None else 'latents'} with latents={latents!r}, and the config "
            f"says load_video_features={config.get('load_video_features')!r}; set both, with "
            'vae=dict(type="perflow_latents"), or neither'
        )


@DATASETS.register_module("perflow_captions")
class Captions(VariableVideoTextDataset):
    """Captions with blank videos. The host's buckets decide on the sizes, as for videos.

    Args:
        data_path: Table of captions: CSV, or what else the host's read_file takes (parquet).
        num_frames: Frames of every video where the table has no such column, >= 1; the host's buckets take videos longer
            than theirs.
        image_size: (height, width) in pixels, likewise.
        fps: What the network is told, > 0.
        latents: A folder that `opensora-perflow encode` wrote, by which samples are latents of zeros in place of blank videos,
            and no VAE is asked; goes with load_video_features=True. None: videos.
        others: As the host's VariableVideoTextDataset (v1.3 passes tokenize_fn).

    Raises:
        ValueError: no column `text`, sizes neither in the table nor given, or rows that are no captions. The message names
            the rows, from 1 for the first after the header.
    """

    def __init__(
        self,
        data_path: str | None = None,
        num_frames: int | None = None,
        image_size: Sequence[int | None] = (None, None),
        fps: float = 24,
        latents: str | None = None,
        **others: Any,
    ) -> None:
        _check_latents(latents)
        self._latent_size = None if latents is None else read_latent_sizes(latents)
        given = dict(zip(SIZES, (num_frames, *_two_sizes(image_size))))
        _check_settings(data_path, fps, given)
        # pandas reads a caption with a comma as two cells, and takes the first one for the row's name.
        rows = read_table(data_path) if str(data_path).endswith(".csv") else None
        try:
            super().__init__(str(data_path), num_frames=num_frames, image_size=tuple(image_size), **others)
        except UnicodeDecodeError as error:
            raise ValueError(f"the host reads tables in UTF-8 only, {data_path} is {error}; save it as CSV UTF-8") from error
        self.data.columns = [str(name).strip() for name in self.data.columns]
        if "text" not in self.data.columns:
            raise ValueError(f"perflow_captions needs a column 'text' in {data_path!r}, got {list(self.data.columns)}")
        # pandas reads the words NA, null and None as missing, and 007 as 7: the message shows what is written.
        written = self.data["text"].tolist() if rows is None else [row.cells["text"] for row in rows]
        if not written or len(written) != len(self.data):
            raise ValueError(f"{data_path}: no captions, or empty rows among them; take the empty rows out")
        _refuse_rows(data_path, "text", written, _is_caption, "no caption (empty, a word for 'missing', or a number)")
        self._set_sizes(data_path, given)
        self.data["text"] = written
        self.fps = fps

    def _set_sizes(self, data_path: Any, given: Mapping[str, Any]) -> None:
        missing = [name for name, value in given.items() if name not in self.data.columns and value is None]
        if missing:
            raise ValueError(
                f"perflow_captions needs the size of its videos: {data_path!r} has no column {', '.join(missing)}; add "
                "dataset=dict(num_frames=51, image_size=(240, 426)), or the columns"
            )
        for name, value in given.items():
            if name in self.data.columns:
                _refuse_rows(data_path, name, self.data[name].tolist(), _is_size, "no integer >= 1")
                self.data[name] = self.data[name].astype(int)
            else:
                self.data[name] = int(value)

    def getitem(self, index: str) -> dict[str, Any]:
        """The sample "row-frames-height-width": what the host's getitem returns, with zeros for the video or its latents."""
        row, *sizes = (int(value) for value in index.split("-"))
        (num_frames, height, width), latent_size = sizes, self._latent_size
        text = self.data.iloc[row]["text"]
        sample = {
            "video": torch.zeros(3, num_frames, height, width) if latent_size is None else torch.zeros(latent_size(*sizes)),
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


def _two_sizes(image_size: Any) -> tuple[int | None, int | None]:
    """(height, width), refusing what only looks like a pair: the string "64" has two parts too."""
    if isinstance(image_size, str) or not isinstance(image_size, Sequence) or len(image_size) != 2:
        raise ValueError(f"image_size of perflow_captions must be (height, width), such as (240, 426), got {image_size!r}")
    return image_size[0], image_size[1]


def _is_caption(text: Any) -> bool:
    if not isinstance(text, str) or not text.strip() or text.strip().lower() in MISSING:
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def _is_size(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 1 <= value < math.inf and int(value) == value


def _refuse_rows(table: Any, column: str, values: list[Any], accepted: Callable[[Any], bool], what: str) -> None:
    """Raises ValueError that names the rows whose value is not accepted."""
    wrong = [(place + 1, value) for place, value in enumerate(values) if not accepted(value)]
    if wrong:
        shown = ", ".join(f"row {row}: {value!r}" for row, value in wrong[:5])
        raise ValueError(f"{table}, column {column}: {shown}: {what} ({len(wrong)} such rows); mend them, or take them out")
