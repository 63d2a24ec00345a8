"""What `opensora-perflow encode` and `store` do, whichever host's configs they read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from opensora_perflow import portable
from opensora_perflow.hosts.chains import ChainSolver, Part
from opensora_perflow.hosts.clips import Clips
from opensora_perflow.hosts.script import cannot_import, refuse_no_config, use_checkout
from opensora_perflow.training.shards import read_indexes, text_digest
from opensora_perflow.training.store import KIND, ChainStore, ChainWriter, Origin

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

Progress = Callable[[int, str], Callable[[int], Any]]
"""(total, of what) -> what is told of how many more are done."""


@dataclass(frozen=True)
class Workers:
    """The processes that share the work: one, or those of torchrun."""

    rank: int = 0
    world: int = 1

    @classmethod
    def started(cls) -> Workers:
        """This process's place, after it has met the others."""
        found = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if found.world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=30))  # the others may have hours of work left
        return found

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def shared(self, value: Any) -> Any:
        """The first process's value, in all: every one has to call."""
        told = [value]
        if self.world > 1:
            dist.broadcast_object_list(told)
        return told[0]

    @property
    def device(self) -> str:
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def use_host(config: Path, open_sora: Path | None) -> bool:
    """Have Open-Sora imported from a checkout; None: the installed one. Is it 2.0?

    Raises:
        ValueError: there is none, or no config.
    """
    refuse_no_config(config)
    use_checkout(open_sora)
    portable.activate()
    try:
        import opensora.datasets
        import opensora.models
        import opensora.registry
    except ImportError as error:
        raise cannot_import(error) from error
    return not hasattr(opensora.registry, "SCHEDULERS")


def store(
    host: ModuleType,
    config: Path,
    out: Path,
    chains: int | None,
    grow: int | None,
    progress: Progress,
    data_path: Path | None,
    first_window: int,
) -> int:
    """Solve chains until the folder `out` has `chains` of them; how many there are.

    Args:
        host: hosts.v1.storing or hosts.v2.storing.
        chains: None: one a row of the data set.
        grow: In place of `chains`: how many more than are there.
        data_path: The table of captions; None: the config's.
        first_window: Further solutions of the first window, for each chain.

    Raises:
        ValueError: see the host's `read_training_config`; a recipe whose chains no store has, or a folder of other chains.
    """
    read_indexes(out, KIND)  # a folder of another kind is refused before anything is written
    cfg, workers = host.read_training_config(config, data_path), Workers.started()
    if grow is not None:
        chains = after_last(out, workers) + grow
    return host.main(cfg, out, chains, workers, progress, first_window)


def after_last(out: Path, workers: Workers) -> int:
    """Number after the last chain of a store, the same in all processes, whatever the others have added when they ask.

    Raises:
        ValueError: there is no chain, or the folder is damaged.
    """
    _, shards = read_indexes(out, KIND)
    count = workers.shared(max((shard.about["first"] + shard.rows for shard in shards.values() if shard.rows), default=0))
    if not count:
        raise ValueError(f"{str(out)!r} holds no {KIND} that --grow could add to; begin a store with --chains")
    return count


def refuse_other_chains(
    out: Path, origin: Origin, captions: Sequence[str], bucket_config: Any, clips: str | None = None
) -> None:
    """Raises ValueError where the folder `out` has chains of other settings, as far as they are known before any network is.

    Args:
        origin: Whose teacher has no fingerprint yet. captions: Of the data set. clips: See clips.clips_digest.
    """
    found, _ = read_indexes(out, KIND)
    if found is not None:
        _writer(out, replace(origin, teacher=found.get("teacher", "")), 0, captions, bucket_config, clips)


def _writer(
    out: Path, origin: Origin, rank: int, captions: Sequence[str], bucket_config: Any, clips: str | None
) -> ChainWriter:
    found, _ = read_indexes(out, KIND)
    known = clips is not None and (found is None or "clips" in found)  # stores of earlier versions do not say
    plan = {"clips": clips} if known else {}
    return ChainWriter(out, origin, rank, captions=text_digest(captions), buckets=plain(bucket_config), **plan)


def solve_chains(
    out: Path,
    solver: ChainSolver,
    parts: Iterator[Part],
    wanted: int,
    captions: Sequence[str],
    bucket_config: Any,
    workers: Workers,
    progress: Progress,
    clips: Clips | None = None,
) -> int:
    """Solve parts until the folder `out` has so many chains; how many there are.

    Args:
        captions: Of the data set.
        clips: At which windows start with noise; None: they start at noise. Clips that cannot be read are left out.

    Raises:
        ValueError: a folder of other chains, see ShardWriter, or one that another process of this rank writes to; no clip can
            be read.
    """
    done, first = progress(wanted, "chains"), 0
    numbered = enumerate(parts)
    with _only_writer(out, workers.rank):
        writer = _writer(out, solver.origin, workers.rank, captions, bucket_config, clips and clips.digest)
        while first < wanted:
            number, part = next(numbered)
            if number % workers.world == workers.rank and not writer.shards.is_there(number):
                read = part if clips is None else clips.of(part, first)
                if read.captions:
                    solved = zip(*map(_reporting(done), solver.solve(read, first)))
                    ends, *others = (None if batches[0] is None else torch.cat(batches) for batches in solved)
                    writer.write(number, first, ends, read.captions, read.told, *others)
                else:
                    writer.shards.leave_out(number)
            else:
                done(len(part.captions))
            first += len(part.captions)
        workers.barrier()
    return len(ChainStore(out))


@contextmanager
def _only_writer(out: Path, rank: int) -> Iterator[None]:
    """Within, no other process writes this rank's index. The lock goes with the process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"lock-{rank:05d}", "w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process writes to the store {str(out)!r}; wait until that one has ended") from None
        except OSError:
            pass  # a file system without locks
        yield


def plain(settings: Any) -> Any:
    """A section of a config as JSON gives it back."""
    return json.loads(json.dumps(settings.to_dict() if hasattr(settings, "to_dict") else settings))


def dtype_of(config: Any) -> torch.dtype:
    """Of networks and texts."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.get("dtype", "bf16"), torch.float32)


def _reporting(done: Callable[[int], Any]) -> Callable[[Any], Any]:
    def report(solved: Any) -> Any:
        done(len(solved[0]))
        return solved

    return report
