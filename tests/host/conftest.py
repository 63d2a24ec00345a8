"""Fixtures of the tests that run Open-Sora's own scripts, once for every checkout that OPENSORA_ROOTS names."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from _harness import SKIP_REASON, SKIP_REASON_2, Clips, host_roots, tag_of, write_clips

HOST_PACKAGES = ("colossalai", "diffusers", "transformers", "timm", "torchvision", "pandas", "pandarallel", "cv2")
HOST_PACKAGES_2 = (
    "colossalai",
    "diffusers",
    "transformers",
    "torchvision",
    "pandas",
    "cv2",
    "peft",
    "wandb",
    "openai",
    "omegaconf",
)
ROOTS = host_roots()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "host: runs scripts of an Open-Sora checkout; needs OPENSORA_ROOTS")


@pytest.fixture(scope="session", params=ROOTS or [None], ids=lambda root: f"v{tag_of(root)}" if root else "no-checkout")
def host_root(request: pytest.FixtureRequest) -> Path:
    """Root of one unmodified checkout; tests that use it run once per checkout."""
    if request.param is None:
        pytest.skip(SKIP_REASON)
    _require(HOST_PACKAGES, SKIP_REASON)
    return request.param


def _require(packages: Sequence[str], reason: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        pytest.fail(f"OPENSORA_ROOTS is set, but this environment lacks {', '.join(missing)}; {reason}")


@pytest.fixture(scope="session", params=host_roots(2) or [None], ids=lambda root: "v2.0" if root else "no-checkout")
def host2_root(request: pytest.FixtureRequest) -> Path:
    """Root of one unmodified checkout of Open-Sora 2.0; tests that use it run once per checkout."""
    if request.param is None:
        pytest.skip(SKIP_REASON_2)
    if find_spec("colossalai") is not None and version("colossalai") < "0.5":  # no CheckpointIO.synchronize (train.py:483)
        pytest.skip(SKIP_REASON_2)
    _require(HOST_PACKAGES_2, SKIP_REASON_2)
    return request.param


@pytest.fixture(scope="session")
def host_tag(host_root: Path) -> str:
    """ "1.0", "1.1", "1.2" or "1.3", found by what the checkout has."""
    return tag_of(host_root)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Four clips of moving shapes, 192 x 192 x 20 frames, and their CSV."""
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def small_clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Eight clips of moving shapes, 64 x 64 x 20 frames, and their CSV: what Open-Sora 2.0 takes in its bucket "64px"."""
    return write_clips(tmp_path_factory.mktemp("small_clips"), count=8, size=64)
