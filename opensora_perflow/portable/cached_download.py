"""huggingface_hub.cached_download, which older diffusers import and newer huggingface_hub no longer have.

Open-Sora v1.2.0 pins diffusers 0.27.2, whose utils/dynamic_modules_utils.py imports the name; without it
`import opensora.models` fails. The host never calls it.
"""

from __future__ import annotations

from typing import Any, NoReturn

from opensora_perflow.portable.imports import announce, is_installed, source_mentions

NAME = "cached_download"


def cached_download(*args: Any, **kwargs: Any) -> NoReturn:
    """Refuse: only the import of the name is needed.

    Raises:
        RuntimeError: always; names the versions that have the real function.
    """
    raise RuntimeError(
        "huggingface_hub.cached_download was called, but the installed huggingface_hub no longer has it; install "
        "'huggingface_hub<0.26', or a diffusers that does not use it"
    )


def install() -> bool:
    if not is_installed("huggingface_hub"):
        return False
    if not source_mentions("diffusers", "utils/dynamic_modules_utils.py", "cached_download"):
        return False
    import huggingface_hub

    if hasattr(huggingface_hub, "cached_download"):
        return False
    huggingface_hub.cached_download = cached_download
    announce(NAME, "huggingface_hub.cached_download can be imported again, because the installed diffusers asks for it")
    return True
