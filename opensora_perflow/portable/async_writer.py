"""tensornvme, which Open-Sora 2.0 imports for asynchronous checkpoints and which is no package of PyPI.

utils/ckpt.py:19 imports the name, whatever the config says; it is used where `async_io=True`.
"""

from __future__ import annotations

from typing import Any

from opensora_perflow.portable.imports import announce, is_installed, provide_modules, source_mentions

NAME = "async_writer"


class AsyncFileWriter:
    """Refuses to be made: only the import of the name is needed.

    Raises:
        RuntimeError: always; names what to change.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("an asynchronous checkpoint was asked for, but tensornvme is not installed; set async_io=False")


def install() -> bool:
    if is_installed("tensornvme") or not source_mentions("opensora", "utils/ckpt.py", "tensornvme"):
        return False
    provide_modules(__name__, {"tensornvme": {}, "tensornvme.async_file_io": {"AsyncFileWriter": AsyncFileWriter}})
    announce(NAME, "AsyncFileWriter can be imported and refuses, because tensornvme is not installed")
    return True
