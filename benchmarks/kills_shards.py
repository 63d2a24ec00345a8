"""Kills the writers of stored chains and of encoded captions at random moments, and looks at what is left.

    python benchmarks/kills_shards.py --kills 50

Two processes write a store of the mixture's chains, or encode captions, in one folder, and are killed (SIGKILL) together, until
the folder is whole; then the next folder is begun. Half of the kills come at a random moment, half within a few milliseconds of
the moment when a file is written aside. After each kill every shard that an index names must be, byte for byte, that of a run
without kills, none that was whole before may be gone, and each writer may have lost one shard at most. "too late" counts kills
that came after both had ended. Needs a system that can fork; a minute or two for 50 kills of each.
"""

from __future__ import annotations

import argparse
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
from worlds import MixtureWorld

from opensora_perflow.hosts import encoded_captions
from opensora_perflow.hosts.v1 import encoded_text
from opensora_perflow.hosts.v1.chain_solver import chain_solver
from opensora_perflow.training.shards import file_name, read_indexes, sha256
from opensora_perflow.training.store import KIND, ChainWriter, chain_noise
from opensora_perflow.worlds.text import TinyTextEncoder

WRITERS, SHARDS, ROWS = 2, 24, 8
Write = Callable[[Path, int], None]
"""(folder, rank) -> what one process does."""


def storing() -> Write:
    """Solves and stores SHARDS shards of ROWS chains."""
    world = MixtureWorld()
    config = dict(watch=None, guidance=dict(mode="fixed", scale=world.guidance))
    solver = chain_solver(world.scheduler(config), world.teacher, None, 0, torch.float32)

    def write(folder: Path, rank: int) -> None:
        writer = ChainWriter(folder, solver.origin, rank)
        for number in range(rank, SHARDS, WRITERS):
            if not writer.shards.is_there(number):
                _, args = world.batch(ROWS, torch.Generator().manual_seed(number))
                noise = torch.stack([chain_noise(0, ROWS * number + row, world.latent_shape) for row in range(ROWS)])
                writer.write(number, ROWS * number, solver.ends(noise, args, ROWS * number)[0], ["a caption"] * ROWS, {})

    return write


def encoding() -> Write:
    """Encodes SHARDS shards of ROWS captions, by one process."""
    encoded_text.ROWS = ROWS
    encoder = TinyTextEncoder(output_dim=4096)
    captions = [f"a red circle number {place} moving right" for place in range(SHARDS * ROWS)]
    header = {"model_max_length": 10, "output_dim": 4096}

    def write(folder: Path, rank: int) -> None:
        if rank == 0:
            encoded_text.encode_captions(folder, captions, encoder.encode, header)

    return write


def start(write: Write, folder: Path) -> list[int]:
    """Fork the writers; their process ids."""
    pids = []
    for rank in range(WRITERS):
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                write(folder, rank)
                os._exit(0)
            except BaseException as error:
                print(f"writer {rank}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        pids.append(pid)
    return pids


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def left(folder: Path, kind: str) -> dict[int, str]:
    """Number -> SHA-256 of each file that an index names; a file that is not as the index says is ''."""
    _, shards = read_indexes(folder, kind)
    found = {}
    for number, shard in shards.items():
        path = folder / file_name(number)
        there = path.is_file() and path.stat().st_size == shard.size and sha256(path) == shard.sha256
        found[number] = shard.sha256 if there else ""
    return found


def kill_often(name: str, kind: str, write: Write, kills: int, rng: random.Random, root: Path) -> dict[str, int]:
    """Counts of what was seen."""
    began = time.perf_counter()
    if any(os.waitpid(pid, 0)[1] for pid in start(write, root / "whole")):
        raise RuntimeError(f"{name} failed without being killed")
    length, whole = time.perf_counter() - began, left(root / "whole", kind)
    counts = {"kills": 0, "too late": 0, "damaged": 0, "whole ones gone": 0, "more than one lost": 0, "folders made whole": 0}
    folder, before = root / "0", {}
    while counts["kills"] < kills:
        pids = start(write, folder)
        if counts["kills"] % 2:
            while not any(folder.glob(".*")) and not all(map(ended, pids)):
                time.sleep(0.0002)
            time.sleep(rng.uniform(0, 0.005))
        else:
            time.sleep(rng.uniform(0, length / 2))
        late = all(map(ended, pids))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        status = [os.waitpid(pid, 0)[1] for pid in pids]
        if any(os.WIFEXITED(one) and os.WEXITSTATUS(one) for one in status):
            raise RuntimeError(f"{name}: a writer refused what a kill left")
        counts["kills"] += 1
        counts["too late"] += late
        found = left(folder, kind)
        counts["damaged"] += any(found[number] != whole[number] for number in found)
        counts["whole ones gone"] += not found.items() >= before.items()
        files = {path.name for path in folder.glob("[0-9]*.safetensors")}
        counts["more than one lost"] += len(files - set(map(file_name, found))) > WRITERS
        before = found
        if len(found) == len(whole):
            counts["folders made whole"] += 1
            folder, before = root / str(counts["kills"]), {}
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills of each command's writers (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, failed = random.Random(args.seed), False
    for name, kind, write in (("store", KIND, storing()), ("encode", encoded_captions.KIND, encoding())):
        with tempfile.TemporaryDirectory() as folder:
            counts = kill_often(name, kind, write, args.kills, rng, Path(folder))
        print(json.dumps({"of": name, **counts}), flush=True)
        failed |= any(counts[what] for what in ("damaged", "whole ones gone", "more than one lost"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
