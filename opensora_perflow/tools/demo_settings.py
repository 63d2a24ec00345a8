"""What the demo can be told: apart from the demo itself, so that a command's help need not load that."""

from dataclasses import dataclass
from pathlib import Path

from opensora_perflow.checks import check_keys, key, number, whole

QUICK = {"iterations": 24, "num_clips": 16, "num_samples": 8, "teacher_iterations": 400}
"""What `--quick` changes."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; every field is an option of `opensora-perflow demo`."""

    videos: Path | None = None
    """Folder of videos (or a CSV with path and text); None writes clips of moving shapes."""
    out: Path = Path("perflow_demo")
    """Folder for everything that is written."""
    open_sora: Path | None = None
    """Root of an Open-Sora v1.2.0 or v1.3 checkout, whose STDiT3 class then takes the place of the small copy of it; or of 2.0,
    whose MMDiT then gets a teacher of its own."""
    iterations: int = key(100, whole())
    """Training steps, >= 1."""
    batch_size: int = key(16, whole())
    """Clips per training step, >= 1."""
    lr: float = key(3e-4, number(above=0))
    """Learning rate after a short warm-up, > 0."""
    num_clips: int = key(64, whole())
    """Clips to write where no videos are given, >= 1."""
    num_samples: int = key(32, whole())
    """Samples that are compared, >= 2."""
    teacher_iterations: int = key(1000, whole())
    """Training steps of Open-Sora 2.0's teacher, >= 1; no weights of that class ship with the package."""
    guidance_scale: float = key(3.0, number(low=0))
    """Scale of the teacher, folded into the student."""
    seed: int = key(0, whole(0))

    def __post_init__(self) -> None:
        check_keys(self)
        if self.num_samples < 2:
            raise ValueError(f"num_samples must be >= 2, to compare distributions, got {self.num_samples}")
