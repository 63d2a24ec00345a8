"""`opensora-perflow estimate`: memory, time and disk of a training, before a GPU is rented."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opensora_perflow import portable
from opensora_perflow.checks import check_num_steps, number
from opensora_perflow.hosts import meta
from opensora_perflow.hosts.outline import Outline
from opensora_perflow.hosts.script import cannot_import, read_host_config, refuse_no_config, use_checkout
from opensora_perflow.tools.residents import residents
from opensora_perflow.tools.step_memory import TEXT, changes, memory_of, seconds_of, stored_bytes
from opensora_perflow.tools.step_units import Units

GIB = 2**30
MARGIN = 0.95
"""Of a card's memory that tensors may take: the rest is CUDA's own, and gaps of the allocator."""


def outline_of(config: Path, open_sora: Path | None) -> Outline:
    """The training that a config describes, from the classes of an Open-Sora checkout.

    Raises:
        ValueError: no Open-Sora, no such config, or a config of another Open-Sora.
    """
    refuse_no_config(config)
    use_checkout(open_sora)
    logging.getLogger("opensora_perflow.portable").setLevel(logging.WARNING)  # nothing of it is computed with
    warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # sizes are all that is wanted
    portable.activate()
    meta.prepare()
    try:
        import opensora.registry as host
    except ImportError as error:
        raise cannot_import(error) from error
    is_v2 = not hasattr(host, "SCHEDULERS")
    settings = read_host_config(config, is_v2)
    if is_v2:
        from opensora_perflow.hosts.v2.outline import outline
    else:
        import opensora.models  # noqa: F401  registers its networks

        from opensora_perflow.hosts.v1.outline import outline
    if settings.get("model") is None:
        raise ValueError(f"{str(config)!r} has no model; name a config that is trained with")
    return outline(settings)


def parts_of(plan: Outline, gpus: int) -> dict[str, int]:
    """Bytes on each GPU that do not depend on the bucket."""
    taught = plan.recipe is not None and plan.recipe.teacher.stored is None
    return residents(
        plan.network, gpus, copied_teacher=taught and not plan.adapters, ema=plan.ema_on_gpu,
        adapters=plan.adapters, sharded_gradients=plan.sharded_gradients,
    ) | {name: sum(tensor.nbytes for tensor in meta.tensors_of(module)) for name, module in plan.encoders.items()}  # fmt: skip


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "estimate",
        help="memory, time and disk of a training, before a GPU is rented",
        description=(
            "Builds what a training config names from Open-Sora's own classes, without weights, and counts: bytes that stay\n"
            "on each GPU, what a step of each bucket keeps for its backward, floating-point operations. Nothing is fetched.\n"
            "Weights to optimizer are exact; a step's peak leaves out the work space of single operations.\n"
            "Each bucket is taken in its largest shape, with texts of full length. Distribution matching is not counted."
        ),
        epilog=(
            "example:\n"
            "  opensora-perflow estimate configs/opensora/perflow_lora.py --open-sora ../Open-Sora --gpus 1 --memory 24"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="config of a training, for Open-Sora 1.0 to 2.0")
    parser.add_argument("--gpus", type=int, default=1, help="that train together (default 1)")
    parser.add_argument("--memory", type=float, metavar="GiB", help="of one GPU: say what fits, and what to change")
    parser.add_argument(
        "--tflops", type=float, metavar="X",
        help="TFLOP/s that a GPU reaches, not its data sheet's (default: an H200 in bf16, 175 for STDiT and 450 for MMDiT)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, help="training steps, for the hours (default 4000)")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds, instead of tables")
    parser.add_argument("--open-sora", type=Path, metavar="ROOT", help="Open-Sora checkout (default: the installed one)")


def run(args: dict[str, Any]) -> int:
    """Run `estimate` with parsed arguments; returns the exit status: 1 where a bucket does not fit."""
    if args["json"] and args["steps"] is not None:
        raise ValueError("--steps counts hours, and --json has seconds a step; leave out one or the other")
    gpus, steps, limit = args["gpus"], 4000 if args["steps"] is None else args["steps"], args["memory"]
    check_num_steps(gpus, "--gpus")
    check_num_steps(steps, "--steps")
    for name in ("tflops", "memory"):
        if args[name] is not None:
            number(above=0)(f"--{name}", args[name])
    plan = outline_of(args["config"], args["open_sora"])
    if gpus % plan.sequence_parallel:
        raise ValueError(f"--gpus must be a multiple of the config's sp_size {plan.sequence_parallel}, got {gpus}")
    parts = parts_of(plan, gpus)
    rows = _rows(plan, parts, gpus, args["tflops"] or plan.tflops, None if limit is None else limit * GIB)
    if args["json"]:
        rows = list(rows)
        print(json.dumps({"gpus": gpus, "parts": parts, "buckets": rows}, indent=1))
    else:
        _print_parts(plan, parts, gpus)
        rows = _print_buckets(plan, rows, args["tflops"] or plan.tflops, steps)
    return int(any(row["changes"] for row in rows))


def _rows(plan: Outline, parts: Mapping[str, int], gpus: int, tflops: float, limit: float | None) -> Iterator[dict[str, Any]]:
    """Of each bucket: bytes, seconds, and what to change where its peak is above the limit, in bytes."""
    for bucket in plan.buckets:
        memory = memory_of(plan, bucket, parts, gpus)
        kept, checkpointed = memory.activations(False, True)
        fits = limit is None or memory.peak <= MARGIN * limit
        yield {
            "bucket": bucket.name,
            "batch": bucket.batch,
            "kept": kept,
            "checkpointed": checkpointed,
            "peak": memory.peak,
            "seconds": seconds_of(plan, bucket, memory, tflops),
            "clip": stored_bytes(plan, bucket),
            "changes": [] if fits else changes(bucket, memory, MARGIN * limit),
        }


def _print_parts(plan: Outline, parts: Mapping[str, int], gpus: int) -> None:
    every, trained = (
        sum(p.numel() for p in plan.network.parameters() if p.requires_grad or not only) for only in (False, True)
    )
    print(f"{type(plan.network).__name__}: {every / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained, on {gpus} GPU")
    for name, size in parts.items():
        print(f"  {name:14}{size / GIB:8.3g} GiB")
    print(f"  {'together':14}{sum(parts.values()) / GIB:8.3g} GiB a GPU, without activations")
    texts = sum(parts.get(name, 0) for name in TEXT)
    if texts > GIB:
        print(f"texts encoded once (`opensora-perflow encode CONFIG`, Open-Sora 1.2 and later) take {texts / GIB:.3g} GiB off")
    print()


def _print_buckets(plan: Outline, rows: Iterator[dict[str, Any]], tflops: float, steps: int) -> list[dict[str, Any]]:
    """Print each row as soon as it is counted; the rows."""
    units, printed = Units.of(plan.recipe), []
    forwards = units.forwards(plan.checkpointing, plan.adapters)
    print(
        f"a step: {forwards:.1f} forwards (way {units.way:g}, teacher {units.teacher:g}, {units.trained} with a gradient), "
        f"{'with' if plan.checkpointing else 'without'} checkpointing; {tflops:g} TFLOP/s; hours of {steps} steps"
    )
    columns = ("batch", "kept", "checkp.", "peak", "s a step", "hours", "MiB a clip")
    print(f"{'bucket (GiB)':>16}" + "".join(f"{name:>11}" for name in columns))
    for row in rows:
        printed.append(row)
        sizes = [row[name] / GIB for name in ("kept", "checkpointed", "peak")]
        numbers = [*sizes, row["seconds"], row["seconds"] * steps / 3600, row["clip"] / 2**20]
        line = f"{row['bucket']:>16}{row['batch']:11d}" + "".join(f"{value:11.3g}" for value in numbers)
        print(line + (f"   too much: {'; or '.join(row['changes'])}" if row["changes"] else ""), flush=True)
    return printed
