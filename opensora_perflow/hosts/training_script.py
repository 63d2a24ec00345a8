"""Open-Sora's own train.py, run as it is, up to where somebody has seen enough of its first steps."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from opensora_perflow.training.players import Batch
from opensora_perflow.training.run import TrainingRun

SCRIPTS = ("scripts/diffusion/train.py", "scripts/train.py")


class Enough(BaseException):
    """Ends the script; a BaseException, so that no `except Exception` of the host holds it."""


Examiner = Callable[[TrainingRun, Batch, nn.Module], None]
"""Shown every training step; raises Enough."""


def script_of(root: str | os.PathLike) -> Path:
    """train.py of a checkout.

    Raises:
        ValueError: there is none.
    """
    found = next((Path(root) / name for name in SCRIPTS if (Path(root) / name).is_file()), None)
    if found is None:
        raise ValueError(f"--open-sora must be the root of an Open-Sora checkout, got {str(root)!r}, which has no {SCRIPTS[1]}")
    return found


def first_steps(script: Path, config: Path, arguments: Sequence[str], examiner: Examiner) -> None:
    """Run train.py on a config until the examiner has seen enough, or the script ends.

    Args:
        script: Of a checkout that run.prepare has made importable.
        config, arguments: The script's own command line.

    What the script writes goes to a folder that is removed. Its errors are the caller's.
    """
    argv = sys.argv
    with tempfile.TemporaryDirectory(prefix="perflow-doctor-") as folder:
        # 1.0 and 1.1 take no --outputs; and a config may be read from another place than its own.
        child = Path(folder) / config.name
        changes = {"_base_": str(config.resolve()), "outputs": str(Path(folder) / "outputs"), "wandb": False, "ckpt_every": 0}
        child.write_text("".join(f"{name} = {value!r}\n" for name, value in changes.items()))
        sys.argv = [str(script), str(child), *arguments]
        TrainingRun.examiner = staticmethod(examiner)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Enough:
            pass
        finally:
            TrainingRun.examiner = None
            sys.argv = argv
