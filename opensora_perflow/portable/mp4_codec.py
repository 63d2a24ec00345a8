"""mp4v for avc1 where OpenCV was built without an H.264 encoder.

write_video_cv2 asks for "avc1" (datasets/utils.py v1.3:184). PyPI's opencv-python cannot encode it: the host would
print "Saved to ..." and write no file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from opensora_perflow.portable.imports import ModuleView, announce, is_installed, source_mentions, when_imported

NAME = "mp4_codec"


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hide what FFmpeg writes to file descriptor 2 while an encoder is tried: it is the answer, not an error."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def can_encode(code: str) -> bool:
    """Whether cv2.VideoWriter opens a small .mp4 file with this fourcc."""
    import cv2

    with tempfile.TemporaryDirectory() as folder, _quiet_stderr():
        writer = cv2.VideoWriter(os.path.join(folder, "probe.mp4"), cv2.VideoWriter_fourcc(*code), 8, (64, 64))
        is_open = writer.isOpened()
        writer.release()
    return is_open


def _use_mp4v(module: ModuleType) -> None:
    fourcc = module.cv2.VideoWriter_fourcc

    def fourcc_we_have(*letters: str) -> int:
        return fourcc(*"mp4v") if letters == tuple("avc1") else fourcc(*letters)

    module.cv2 = ModuleView(module.cv2, VideoWriter_fourcc=fourcc_we_have)


def install() -> bool:
    if not source_mentions("opensora", "datasets/utils.py", "avc1") or not is_installed("cv2"):
        return False
    if can_encode("avc1") or not can_encode("mp4v"):
        return False
    when_imported("opensora.datasets.utils", _use_mp4v)
    announce(NAME, "videos are written as mp4v, because the installed OpenCV has no encoder for avc1")
    return True
