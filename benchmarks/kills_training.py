"""Kills Open-Sora's own train.py at random moments, goes on with --load, and looks at what is left.

    python benchmarks/kills_training.py --open-sora Open-Sora-v1.2.0 --kills 30      # host environment; 10 minutes

The tiny stage 1 saves a checkpoint at every step. Each run begins from the last checkpoint that train.py said it saved, and is
killed (SIGKILL, all its processes): a third of the runs while they start, a third at a random moment after their first
checkpoint, and a third within a few milliseconds of the moment when a checkpoint's folder appears. After each kill every
checkpoint that was said to be saved must be as it was, and the next run must go on from the last one.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from tqdm import tqdm

from opensora_perflow.training.shards import sha256
from opensora_perflow.worlds.clips import write_clips

REPOSITORY = Path(__file__).resolve().parents[1]
SAVED = re.compile(r"Saved checkpoint at .* global_step (\d+) to (\S+)")
PATIENCE = 300
"""Seconds until a run that shows nothing counts as stuck."""
STARTING = 20
"""Seconds in which a run is killed while it starts."""


class Run:
    """train.py in a process group of its own."""

    def __init__(self, root: Path, folder: Path, config: Path, log: Path, load: Path | None) -> None:
        self.folder, self.log, self.began = folder, log, time.monotonic()
        command = [sys.executable, "-m", "opensora_perflow.run", str(root / "scripts/train.py"), str(config)]
        command += ["--data-path", "clips/clips.csv", "--outputs", "outputs", *(("--load", str(load)) if load else ())]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )

    def saved(self) -> list[tuple[int, Path]]:
        """Step and folder of each checkpoint that train.py said it saved."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))
        return [(int(step), self.folder / path) for step, path in SAVED.findall(text)]

    def folders(self, besides: frozenset[Path] = frozenset()) -> frozenset[Path]:
        """Folders of checkpoints, whole or not, besides those that are known."""
        return frozenset(self.folder.glob("outputs/*/epoch*")) - besides

    def wait(self, ready: Callable[[], object], pause: float) -> None:
        """Raises RuntimeError where train.py ends, or shows nothing, before `ready`."""
        while not ready():
            if self.process.poll() is not None or time.monotonic() - self.began > PATIENCE:
                raise RuntimeError(f"train.py did not go on:\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(pause)

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def files_of(checkpoint: Path) -> dict[str, str]:
    """What a checkpoint holds, by content."""
    return {str(file.relative_to(checkpoint)): sha256(file) for file in sorted(checkpoint.rglob("*")) if file.is_file()}


def kill_runs(root: Path, folder: Path, kills: int, seed: int) -> Iterator[dict[str, int]]:
    """One row a kill: where it came, the step that was loaded, and how many checkpoints are whole.

    Raises:
        RuntimeError: a run that did not go on.
        AssertionError: a checkpoint that was said to be saved is not as it was.
    """
    write_clips(folder / "clips", 4, num_frames=20, height=192, width=192)
    config = folder / "config.py"
    base = str(REPOSITORY / "configs/opensora/perflow_tiny_stage1.py")
    config.write_text(f"_base_ = {base!r}\nckpt_every = 1\nepochs = 10_000\nema_decay = 0.9\n")
    moments, whole, last = random.Random(seed), {}, (0, None)
    for number in range(kills):
        run = Run(root, folder, config, folder / f"{number}.log", last[1])
        try:
            if number % 3 == 0:
                time.sleep(moments.uniform(0, STARTING))
            else:
                run.wait(run.saved, 0.1)
                before = run.folders()
                if number % 3 == 1:
                    time.sleep(moments.uniform(0, 5))
                else:
                    run.wait(partial(run.folders, before), 0.0005)
                    time.sleep(moments.uniform(0, 0.05))
        finally:
            run.kill()
        saved = run.saved()
        if saved:
            assert saved[0][0] == last[0] + 1, f"went on with step {saved[0][0]} after {last[0]}"
        for checkpoint, files in whole.items():
            assert files_of(checkpoint) == files, f"{checkpoint} changed"
        loaded, last = last[0], saved[-1] if saved else last
        # A folder is overwritten where a killed run had saved a part of it: only what was said to be saved counts.
        whole |= {checkpoint: files_of(checkpoint) for _, checkpoint in saved}
        yield {"kind": number % 3, "loaded": loaded, "saved": len(saved), "whole": len(whole)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-sora", type=Path, required=True, metavar="ROOT", help="checkout of v1.2.0")
    parser.add_argument("--kills", type=int, default=30, help="kills (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = kill_runs(args.open_sora.resolve(), Path(folder), args.kills, args.seed)
        rows = list(tqdm(runs, total=args.kills, desc="kills"))
    starts = sum(row["kind"] == 0 for row in rows)
    went_on = sum(row["loaded"] > 0 and row["saved"] > 0 for row in rows)
    print(
        f"{len(rows)} kills, {starts} while starting; {went_on} runs went on from a checkpoint, at the next step; "
        f"{rows[-1]['whole']} checkpoints were saved, and none was lost or changed"
    )


if __name__ == "__main__":
    main()
