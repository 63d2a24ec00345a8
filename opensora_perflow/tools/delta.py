"""`opensora-perflow delta make`, `merge`, `inspect`: what a student learned as a file, and a fine-tune with it in few steps."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_perflow.hosts.v1.weights import TABLES, matched, read_source
from opensora_perflow.hosts.v2.host import with_later
from opensora_perflow.hosts.v2.lora import SAVED, lora_folder, peft_config, peft_state
from opensora_perflow.tools.export import student as averaged_student
from opensora_perflow.tools.layouts import FILES, LAYOUTS, check_free, refuse_taken, write_lora, write_weights
from opensora_perflow.tools.merge import check_whole, lora_network, read_whole, whole_network
from opensora_perflow.training.adapters import DOWN, is_added
from opensora_perflow.training.delta import KEPT, REST, Distance, added, changed, compare, difference, low_rank, mismatches
from opensora_perflow.training.delta_file import DTYPES, Origin, read_delta, write_delta
from opensora_perflow.training.state import StudentState, averages_beside, find_state
from opensora_perflow.training.teacher import digest

logger = logging.getLogger("opensora_perflow")

SAME_WAY = 0.9
"""Cosine to a delta that no other training has by accident: of an average, or another step, of the same training."""

_EXAMPLES = {
    "make": [
        "  opensora-perflow delta make outputs/000-STDiT3-XL-2/epoch0-global_step4000 few_steps.safetensors --base BASE",
        "  opensora-perflow delta make outputs/lora/epoch0-global_step4000 lora.safetensors --base BASE    (2.0)",
    ],
    "merge": ["  opensora-perflow delta merge few_steps.safetensors FINE_TUNE student --base BASE"],
    "inspect": ["  opensora-perflow delta inspect few_steps.safetensors --into FINE_TUNE --base BASE"],
}


def make(student: str, base: str, out: Path, rank: int | None = None) -> str:
    """Write student - base to OUT, or the adapters of a rank that come nearest to it; returns what was found, in words.

    Args:
        student, base: As a teacher's weights may be named. The student may be a checkpoint of adapters.
        out: A .safetensors file, or with a rank a folder, as a training of adapters writes it.
        rank: >= 1, or None.

    Raises:
        ValueError: weights that are not of one network, a student of another base, or an OUT that cannot be.
    """
    _check_made(out, rank)
    before = read_whole(base)
    after, state = _student(student, base, before)
    if state is None and (taught := find_state(base)) is not None:
        raise ValueError(
            f"{base!r} is a student ({taught[1]}), and {student!r} is not known as one; if the two changed places, name the "
            "student first, else put its perflow.json beside it"
        )
    began = _matched(before, after)
    _check_same(after, began, student, base)
    delta = difference(after, began)
    delta |= {KEPT + name: after[name] for name in TABLES if name in after and name not in before}
    changes = changed(delta)
    if not changes:
        raise ValueError(
            f"{student!r} and {base!r} hold the same weights, so there is no delta; name the weights that the training started "
            "from with --base"
        )
    distance = compare(after, began, changes)
    if not distance.related:
        raise ValueError(
            f"{student!r} is no student of {base!r}: its weights are {distance.drift / distance.base:.2f} of the base's norm "
            "away, and a training moves them by hundredths; name the weights that its training started from"
        )
    said = [
        f"{len(changes)} of {len(after)} tensors changed; norm of the delta: {distance.delta / distance.base:.5f} of the base's"
    ]
    if rank is None:
        widest = max((value.dtype for value in after.values()), key=lambda dtype: dtype.itemsize)
        dtype = next((name for name, known in DTYPES.items() if known == widest), "float32")
        text = None if state is None else state.to_json()
        write_delta(out, delta, Origin(_digest(began, changes), base, student, dtype, text))
    else:
        said.append(_write_adapters(out, rank, changes, began, state))
    return "\n".join(said)


def merge(delta: Path, into: str, out: Path, base: str | None = None, scale: float = 1.0, dtype: str | None = None) -> None:
    """Write INTO + scale * delta to OUT, after its report was printed.

    Args:
        delta: A file that `make` wrote.
        into: The delta's base, or a fine-tune of it, as a teacher's weights may be named.
        out: See layouts.LAYOUTS; it must not exist.
        base: Where INTO is a fine-tune: the delta's base, which the fine-tune is compared with.
        scale: Of the delta; 1 is the student's whole change.
        dtype: Of OUT, a key of DTYPES; None: the wider one of INTO's and the student's.

    Raises:
        ValueError: another base, weights of another network, a fine-tune of another base, or an OUT that cannot be.
    """
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"--scale must be a number other than 0, got {scale}")
    origin, tensors = read_delta(delta)
    check_free(out, origin.student)
    weights, distance, report = _compared(origin, tensors, into, base)
    found, state = find_state(into), origin.student
    known = found is not None and (state is None or found[0].stage >= state.stage)
    known = known and distance.drift and find_state(base) is None  # a fine-tune of a student is one too
    if known or distance.cosine > SAME_WAY:
        why = str(found[1]) if known else f"its cosine to the delta is {distance.cosine:.3f}"
        raise ValueError(
            f"{into!r} is a few-step student already ({why}), and a delta goes into its base or into a fine-tune; name those "
            "weights"
        )
    print(report, flush=True)
    own = max((value.dtype for value in weights.values()), key=lambda found: found.itemsize)
    chosen = torch.promote_types(own, DTYPES[origin.dtype]) if dtype is None else DTYPES[dtype]
    write_weights(out, added(weights, tensors, scale, chosen), origin.student)


def inspect(delta: Path, into: str | None = None, base: str | None = None) -> str:
    """What a delta is, in words; with INTO, how it lies to these weights, see `merge`."""
    if into is None and base is not None:
        raise ValueError("--base is the base of a fine-tune that --into names, and there is no --into; name both, or neither")
    origin, tensors = read_delta(delta)
    changes, state = changed(tensors), origin.student
    lines = [
        f"delta of {origin.student_source} from {origin.base_source} ({origin.base})",
        f"{len(changes)} tensors, {sum(value.numel() for value in changes.values()) / 1e6:.2f} M parameters, of which "
        f"{sum(value.shape[1] for name, value in tensors.items() if name.startswith(REST))} need more than float32",
        "windows: not known" if state is None else f"windows: {' '.join(f'{edge:.4g}' for edge in state.windows)}; guidance "
        f"{state.guidance}; stage {state.stage}, {state.steps} steps",
    ]  # fmt: skip
    if into is not None:
        lines.append(_compared(origin, tensors, into, base)[2])
    return "\n".join(lines)


def _compared(
    origin: Origin, tensors: Mapping[str, Tensor], into: str, base: str | None
) -> tuple[dict[str, Tensor], Distance, str]:
    """The weights that a delta goes into, and how they lie to it, also in words."""
    changes = changed(tensors)
    raw = read_whole(into)
    kept = {name.removeprefix(KEPT): value for name, value in tensors.items() if name.startswith(KEPT)}
    weights = kept | _matched(raw, changes) | {name: value for name, value in raw.items() if name not in changes}
    _check_same(changes, weights, "the delta", into, whole=False)
    is_base = _digest(weights, changes) == origin.base
    if not is_base and base is None:
        raise ValueError(
            f"{into!r} is not the base that the delta was made from ({origin.base_source}); if it is a fine-tune of that base, "
            "name the base with --base, so that both can be compared"
        )
    began = weights
    if base is not None and base != into:
        began = _matched(read_whole(base), changes)
        _check_same(changes, began, "the delta", base, whole=False)
        if _digest(began, changes) != origin.base:
            raise ValueError(
                f"the delta was made from another base than {base!r}: from {origin.base_source}; name that one with --base"
            )
    elif not is_base:
        raise ValueError(
            f"the delta was made from another base than {into!r}: from {origin.base_source}; name that one with --base"
        )
    # In the precision of these weights: what that rounds away, no fine-tuning moved.
    distance = compare(weights, {name: began[name].to(weights[name].dtype) for name in changes}, changes)
    if not distance.related:
        raise ValueError(
            f"{into!r} is no fine-tune of the delta's base: its weights are {distance.drift / distance.base:.2f} of the base's "
            "norm away; name a fine-tune of that base"
        )
    return weights, distance, f"{len(changes)} tensors change, {len(weights) - len(changes)} stay; {_words(distance)}"


def _words(distance: Distance) -> str:
    if not distance.drift:
        return "these weights are the delta's base"
    direction = "with" if distance.cosine > 0.1 else "against" if distance.cosine < -0.1 else "across"
    return (
        f"the fine-tune is {distance.drift / distance.base:.5f} of the base's norm from the base, the delta "
        f"{distance.delta / distance.base:.5f}; cosine {distance.cosine:.3f}: the fine-tune went {direction} the delta"
    )


def _check_made(out: Path, rank: int | None) -> None:
    if rank is None and out.suffix != ".safetensors":
        raise ValueError(f"a delta is a .safetensors file, got {str(out)!r}; with --rank it is a folder")
    if rank is not None and rank < 1:
        raise ValueError(f"--rank must be >= 1, got {rank}")
    if rank is not None and out.suffix in FILES:
        raise ValueError(f"adapters are a folder, got the file {str(out)!r}; name a folder, or leave --rank out for a delta")
    refuse_taken(out)


def _matched(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the form of another one of the same network, whichever host's."""
    return with_later(matched(state, like), like)


def _student(source: str, base: str, before: dict[str, Tensor]) -> tuple[dict[str, Tensor], StudentState | None]:
    """A student's whole weights, of a checkpoint folder with averaged ones (EMA) those; and what is known of it."""
    if lora_folder(source) is not None:
        merged, state = lora_network(source, base, before, dtype=torch.float32)
        return check_whole(merged, source), state
    averaged = Path(source).is_dir() and averages_beside(source) is not None
    state = averaged_student(Path(source), True)[0] if averaged else read_source(source)
    if state and all(is_added(name) for name in state):
        merged, known = whole_network(source, state, base, before, torch.float32)
        return check_whole(merged, source), known
    after, found = check_whole(state, source), find_state(source)
    if found is None:
        logger.warning("%s has no perflow.json, so that samplers of what the delta makes are not told its windows", source)
    return after, None if found is None else found[0]


def _check_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], first: str, second: str, whole: bool = True) -> None:
    problems = mismatches(ours, theirs, (first, second), whole)
    if problems:
        raise ValueError(f"{first} and {second} are not of one network: {problems}; name weights of the same one")


def _digest(weights: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> str:
    """Identity of the weights that a delta changes, whatever else a file holds and in which dtype."""
    return digest({name: weights[name].float() for name in changes})


def _write_adapters(
    out: Path, rank: int, changes: Mapping[str, Tensor], base: Mapping[str, Tensor], state: StudentState | None
) -> str:
    if state is None:
        raise ValueError("adapters are loaded by their perflow.json, and the student has none; put it beside the student")
    layers = {
        name.removesuffix(".weight"): value.shape
        for name, value in base.items()
        if value.dim() == 2 and name.endswith(".weight")
    }
    adapted = {f"{name}.weight": base[f"{name}.weight"] for name in layers}
    if (state.transform or {}).get("formula") == "v2.0":
        saved = {name: base[name].float() + value for name, value in changes.items() if name.startswith(SAVED)}
        changes = {name: value for name, value in changes.items() if name not in saved}
        missed = _write_lora_of_2(out, rank, changes, saved, layers, state)
    else:
        adapters, missed = low_rank(changes, layers, rank)
        record = {"rank": rank, "alpha": rank, "targets": None, "base": digest(adapted)}
        write_weights(out, adapters, replace(state, adapters=record))
    lost = sum(value.double().square().sum().item() for name, value in changes.items() if name not in adapted)
    share = (lost / sum(value.double().square().sum().item() for value in changes.values())) ** 0.5
    return f"adapters of rank {rank} miss {missed:.4f} of the delta's norm; weights that no adapter has make {share:.4f} of it"


def _write_lora_of_2(
    out: Path,
    rank: int,
    changes: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    layers: Mapping[str, torch.Size],
    state: StudentState,
) -> float:
    """The share of the changes' norm that the adapters miss. saved: Weights that Open-Sora 2.0 keeps whole beside them."""
    adapters, missed = low_rank(changes, {name: of for name, of in layers.items() if f"{name}.weight" in changes}, rank)
    names = [name.removesuffix(DOWN) for name in adapters if name.endswith(DOWN)]
    write_lora(out, peft_state(adapters, saved), peft_config(rank, names, bool(saved)), state)
    return missed


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "delta",
        help="make few steps an ingredient: student minus base as a file, merged into any fine-tune of the base",
        description=(
            "A delta is what a student learned: its weights minus those that its training started from. Added to a fine-tune\n"
            "of the same base, it should make that a few-step student. Windows and guidance are in the file, and are written\n"
            "beside what is merged. How good such students are was not measured."
        ),
        epilog="\n".join(["examples:", *_EXAMPLES["make"], *_EXAMPLES["merge"], *_EXAMPLES["inspect"]]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, what: str) -> argparse.ArgumentParser:
        epilog = "\n".join(["example:", *_EXAMPLES[name]])
        raw = argparse.RawDescriptionHelpFormatter
        return actions.add_parser(name, help=what, description=what, epilog=epilog, formatter_class=raw)

    one = action("make", "write a delta, or with --rank adapters")
    one.add_argument(
        "student", metavar="STUDENT", help="checkpoint folder (its EMA, if any), file or Hugging Face folder; also of adapters"
    )
    one.add_argument("out", type=Path, metavar="OUT", help="file .safetensors; with --rank a folder")
    one.add_argument("--base", required=True, metavar="WEIGHTS", help="the weights that the training started from")
    one.add_argument("--rank", type=int, metavar="R", help="write the nearest adapters (LoRA) of this rank instead")
    two = action("merge", "add a delta to weights")
    two.add_argument("delta", type=Path, metavar="DELTA", help="file of `delta make`")
    two.add_argument("into", metavar="INTO", help="the base, or a fine-tune of it")
    two.add_argument("out", type=Path, metavar="OUT", help=LAYOUTS)
    two.add_argument("--base", metavar="WEIGHTS", help="the delta's base, where INTO is a fine-tune")
    two.add_argument("--scale", type=float, default=1.0, help="of the delta (default 1)")
    two.add_argument("--dtype", choices=tuple(DTYPES), help="of OUT (default: the wider one of INTO's and the student's)")
    three = action("inspect", "say what a delta is, and how weights lie to it; write nothing")
    three.add_argument("delta", type=Path, metavar="DELTA", help="file of `delta make`")
    three.add_argument("--into", metavar="WEIGHTS", help="the base, or a fine-tune of it")
    three.add_argument("--base", metavar="WEIGHTS", help="the delta's base, where those are a fine-tune")


def run(args: dict[str, Any]) -> int:
    """Run `delta` with parsed arguments; returns the exit status."""
    action = args.pop("action")
    if action == "inspect":
        print(inspect(**args))
        return 0
    said = make(**args) if action == "make" else merge(**args)
    print("\n".join(filter(None, [said, f"written to {args['out']}"])))
    return 0
