"""av.AVError, which PyAV 14 dropped in favour of av.FFmpegError.

The host names it in `except` clauses of datasets/read_video.py (v1.2.0:103, v1.3:106), and so does torchvision 0.17. They are
evaluated only when something fails: the missing name would hide the real error of a damaged video.
"""

from __future__ import annotations

from opensora_perflow.portable.imports import announce, is_installed

NAME = "pyav_error"


def install() -> bool:
    if not is_installed("av"):
        return False
    import av

    if hasattr(av, "AVError"):
        return False
    # An attribute of the module itself: every `av.AVError` is looked up there, in the host and in torchvision alike.
    av.AVError = av.FFmpegError
    announce(NAME, f"av.AVError is av.FFmpegError, because PyAV {av.__version__} no longer has the old name")
    return True
