"""Kills the demo, or the commands that write weights, at random moments, and counts outputs that are not whole.

    python benchmarks/kills.py --kills 100
    python benchmarks/kills.py --kills 250 --what weights      # two minutes

Each run has its own seed, so that each of its files differs from those of all other runs. Half of the kills come at a random
moment of the run, half within a few milliseconds of the moment when the files take their places. After each kill the output
folder must hold every file of the last whole run or every file of the killed one, and the user's own files. "too late" counts
runs that had ended by themselves. Needs a system that can fork; about 10 minutes for 100 kills on 2 CPU cores.

With --what weights a student of the demo's teacher is exported, becomes a delta, or comes from that delta merged into a folder
or a file, in turn. After each kill an output must be absent, or be read as whole with its windows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from opensora_perflow.checkpoints import read_state_dict, write_state_dict
from opensora_perflow.tools import compare, delta, demo
from opensora_perflow.tools.export import export
from opensora_perflow.tools.report import KIND
from opensora_perflow.training.delta_file import read_delta
from opensora_perflow.training.state import StudentState, find_state, write_state
from opensora_perflow.worlds.model import load_teacher

OWN = {"notes.txt": "mine", "clips/holiday.mp4": "my video", "sub/deep/list.csv": "1,2"}
"""The user's files, which must outlive every kill."""


def start(out: Path, seed: int) -> int:
    """Fork a demo with everything small, and return its process id."""

    def run() -> None:
        compare.REFERENCE = (1,) * 4
        demo.run(demo.DemoSettings(out=out, seed=seed, iterations=1, batch_size=1, num_clips=2, num_samples=2))

    return forked(run)


def forked(run: Callable[[], object]) -> int:
    """Run something silently in a process of its own, and return its id."""
    pid = os.fork()
    if pid == 0:
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            torch.set_num_threads(1)
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return pid


def digest(out: Path) -> dict[str, str]:
    """Every file below a folder, user's files apart, and what is in it."""
    files = [path for path in out.rglob("*") if path.is_file() and path.relative_to(out).as_posix() not in OWN]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_of(out: Path, files: dict[str, str], before: dict[str, str], seed: int) -> bool:
    """Whether all files are those of the run with this seed, and none of the run before."""
    if not set(KIND.names) <= files.keys() or any(files[name] == before.get(name) for name in files):
        return False
    return json.loads((out / "results.json").read_text())["settings"]["seed"] == seed


def when_written(out: Path, pid: int) -> None:
    """Wait until the run `pid` has written its last file aside, or has ended."""
    while not any(out.parent.glob(f".{out.name}.unfinished-*/results.json")):
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.0002)


def kill_writers(kills: int, rng: random.Random) -> dict[str, int]:
    """How often `export`, `delta make` and `delta merge` leave nothing, something whole, or something else."""
    counts = {"nothing": 0, "whole": 0, "not whole": 0, "too late": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = load_teacher().state_dict()
        student = {key: value * 1.01 if value.is_floating_point() else value for key, value in base.items()}
        write_state_dict(folder / "base.safetensors", base)
        write_state_dict(folder / "student" / "model" / "model.safetensors", student)
        write_state(folder / "student", StudentState((1.0, 0.5, 0.0), None, "linear", "velocity", {"mode": "sync"}))
        sources = str(folder / "student"), str(folder / "base.safetensors")
        delta.make(*sources, folder / "whole.safetensors")

        def work(out: Path) -> None:
            if out.stem.startswith("delta"):
                delta.make(*sources, out)
            elif out.stem.startswith("export"):
                export(folder / "student", out, ema=False)
            else:
                delta.merge(folder / "whole.safetensors", sources[1], out)

        def is_whole(out: Path) -> bool:
            try:
                if out.stem.startswith("delta"):
                    return len(read_delta(out)[1]) > 0
                found = read_state_dict(out)
                return find_state(out)[0].windows == (1.0, 0.5, 0.0) and all(
                    torch.equal(found[key], student[key]) for key in student
                )
            except (ValueError, TypeError):
                return False

        outs = ("delta{}.safetensors", "export{}", "out{}", "pt{}/student.pt", "one{}/student.safetensors")
        lengths = {}
        for kill in range(-len(outs), kills):
            kind = outs[kill % len(outs)]
            out = folder / kind.format(kill)
            began = time.perf_counter()
            pid = forked(lambda out=out: work(out))
            if kill >= 0:
                time.sleep(rng.uniform(0, 1.1 * lengths[kind]))
                os.kill(pid, signal.SIGKILL)
            ended = os.WIFEXITED(os.waitpid(pid, 0)[1])
            lengths.setdefault(kind, time.perf_counter() - began)
            if kill >= 0:
                counts["too late"] += ended
                counts["nothing" if not out.exists() else "whole" if is_whole(out) else "not whole"] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--what", choices=("demo", "weights"), default="demo", help="what is killed (default demo)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    if args.what == "weights":
        counts = kill_writers(args.kills, rng)
        print(json.dumps(counts))
        return int(counts["not whole"] > 0)
    counts = {"all old": 0, "all new": 0, "too late": 0, "mixed": 0, "user's files lost": 0}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "perflow_demo"
        began = time.perf_counter()
        if os.waitpid(start(out, 1), 0)[1]:
            raise RuntimeError("the demo failed without being killed")
        length = time.perf_counter() - began
        for name, text in OWN.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text)
        before = digest(out)
        for kill in range(args.kills):
            pid = start(out, seed := kill + 2)
            if kill % 2:
                when_written(out, pid)
                time.sleep(rng.uniform(0, 0.005))
            else:
                time.sleep(rng.uniform(0, 1.1 * length))
            os.kill(pid, signal.SIGKILL)
            counts["too late"] += os.WIFEXITED(os.waitpid(pid, 0)[1])
            files = digest(out)
            if files == before:
                counts["all old"] += 1
            elif is_of(out, files, before, seed):
                counts["all new"] += 1
                before = files
            else:
                counts["mixed"] += 1
                kept = [name for name in files if files[name] == before.get(name)]
                print(
                    f"kill {kill}: of the run before {kept}, missing {sorted(set(KIND.names) - files.keys())}", file=sys.stderr
                )
                before = files
            counts["user's files lost"] += any(
                not (out / name).is_file() or (out / name).read_text() != text for name, text in OWN.items()
            )
        left = len(list(out.parent.glob(".*")))
        os.waitpid(start(out, 0), 0)
        counts |= {"folders left by kills": left, "folders left after the next run": len(list(out.parent.glob(".*")))}
    print(json.dumps(counts))
    return int(counts["mixed"] > 0 or counts["user's files lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())
