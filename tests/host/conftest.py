"""Fixtures of the tests that run Open-Sora's own scripts, once for every checkout that OPENSORA_ROOTS names."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from _harness import SKIP_REASON, Clips, host_roots, tag_of, write_clips

HOST_PACKAGES = ("colossalai", "diffusers", "transformers", "timm", "torchvision", "pandas", "pandarallel", "cv2")
ROOTS = host_roots()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "host: runs scripts of an Open-Sora checkout; needs OPENSORA_ROOTS")


@pytest.fixture(scope="session", params=ROOTS or [None], ids=lambda root: f"v{tag_of(root)}" if root else "no-checkout")
def host_root(request: pytest.FixtureRequest) -> Path:
    """Root of one unmodified checkout; tests that use it run once per checkout."""
    if request.param is None:
        pytest.skip(SKIP_REASON)
    missing = [name for name in HOST_PACKAGES if find_spec(name) is None]
    if missing:
        pytest.fail(f"OPENSORA_ROOTS is set, but this environment lacks {', '.join(missing)}; {SKIP_REASON}")
    return request.param


@pytest.fixture(scope="session")
def host_tag(host_root: Path) -> str:
    """ "1.0", "1.1", "1.2" or "1.3", found by what the checkout has."""
    return tag_of(host_root)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Four clips of moving shapes, 192 x 192 x 20 frames, and their CSV."""
    return write_clips(tmp_path_factory.mktemp("clips"))
