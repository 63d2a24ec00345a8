"""Settings that people write by mistake: what the scheduler says to them.

    python benchmarks/faults_settings.py --what configs --count 10000 --seed 0    # random configs of all keys
    python benchmarks/faults_settings.py --what values                            # every key with each of 95 odd values

Prints how many trials ended in which way, then the faults. Ways to end: refused (ValueError when the scheduler is built), told
(ValueError at the first training step), trained, accepted (built, but no step was taken: it would evaluate networks too often,
or names files). Faults: crash (any other exception, also from deepcopy or JSON of the settings), hang (over 5 s until the
scheduler is built, or 60 s with a step), nan (one training step of the tests' small network gave a loss that is not finite,
without a word).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import decimal
import fractions
import io
import json
import logging
import multiprocessing
import random
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from networks import Epsilon, batch, tiny_network

from opensora_perflow import PeRFlow
from opensora_perflow.hosts.v1 import keys as host_keys
from opensora_perflow.training import curriculum, recipe

FAULTS = ("crash", "hang", "nan")
SECONDS, SECONDS_WITH_A_STEP = 5, 60
MOST_EVALUATIONS = 80
"""Of networks in the one training step."""


# --- odd values ---


class Two(IntEnum):
    TWO = 2


class NeverEqual:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    __hash__ = object.__hash__


class AlwaysEqual:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = object.__hash__


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("printed")


class Text(str):
    pass


class BrokenPath:
    def __fspath__(self) -> bytes:
        return b"bytes"


def nested(make: Callable[[Any], Any], depth: int = 100_000) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = make(value)
    return value


def own_item() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


VALUES: tuple[Callable[[], Any], ...] = (
    # fmt: off
    lambda: None,
    lambda: True,
    lambda: False,
    lambda: 0,
    lambda: 1,
    lambda: -1,
    lambda: 2,
    lambda: 4,
    lambda: 1001,
    lambda: 10**8,
    lambda: 10**400,
    lambda: -(10**400),
    lambda: 10**5000,
    lambda: 2**63,
    lambda: 0.0,
    lambda: -0.0,
    lambda: 0.5,
    lambda: 1.0,
    lambda: 4.0,
    lambda: 2.5,
    lambda: 1e-300,
    lambda: 1e300,
    lambda: -1.5,
    lambda: float("inf"),
    lambda: float("-inf"),
    lambda: float("nan"),
    lambda: 1j,
    lambda: decimal.Decimal(4),
    lambda: decimal.Decimal("sNaN"),
    lambda: fractions.Fraction(1, 2),
    lambda: fractions.Fraction(4),
    lambda: "",
    lambda: " ",
    lambda: "4",
    lambda: "4.0",
    lambda: "auto",
    lambda: "None",
    lambda: "True",
    lambda: "False",
    lambda: "x" * 10**6,
    lambda: "\0",
    lambda: "\ud800.json",
    lambda: "perflow",
    lambda: "a.b",
    lambda: "missing.json",
    lambda: "٤",
    lambda: b"",
    lambda: b"4",
    lambda: bytearray(b"ab"),
    lambda: [],
    lambda: (),
    lambda: {},
    lambda: {1},
    lambda: [1, 0],
    lambda: [1.0, 0.5, 0.0],
    lambda: [4, 2, 1],
    lambda: [1.0, 9.0],
    lambda: [float("nan")],
    lambda: [1, float("inf"), 0],
    lambda: [None],
    lambda: [True, False],
    lambda: [[1]],
    lambda: nested(lambda value: [value]),
    lambda: nested(lambda value: {"a": value}),
    own_item,
    lambda: [1.0] * 10**6,
    lambda: range(10**9),
    lambda: (i for i in range(3)),
    lambda: len,
    lambda: object(),
    lambda: int,
    lambda: ...,
    lambda: np.bool_(True),
    lambda: np.int64(4),
    lambda: np.float32(0.5),
    lambda: np.float64("nan"),
    lambda: np.str_("student"),
    lambda: np.array(4),
    lambda: np.array([1.0, 0.5, 0.0]),
    lambda: np.array(["a"], dtype=object),
    lambda: torch.tensor(4),
    lambda: torch.tensor(0.5),
    lambda: torch.tensor([1.0, 0.0]),
    lambda: torch.tensor(True),
    lambda: Path("x"),
    lambda: Path("x.json"),
    lambda: datetime.date(2024, 1, 1),
    NeverEqual,
    AlwaysEqual,
    Unprintable,
    lambda: Two.TWO,
    lambda: Text("student"),
    BrokenPath,
    lambda: {1: 2},
    lambda: {"self": 1},
    # fmt: on
)
assert len(VALUES) == 95, len(VALUES)


# --- keys ---

SECTIONS: dict[str, tuple[type, dict[str, Any]]] = {
    "teacher": (recipe.TeacherSettings, {}),
    "guidance": (recipe.Guidance, dict(mode="fixed", scale=3.0)),
    "draws": (recipe.Draws, {}),
    "curriculum": (recipe.Stages, dict(windows=[4, 2, 1])),
    "watch": (recipe.WatchSettings, {}),
    "long_video": (host_keys.LongVideoConfig, {}),
}
"""Section -> its record, and what a config of it needs besides the key that is tried."""


def all_keys() -> Iterator[tuple[str, ...]]:
    """Every key, as its path in the config."""
    for cls in (recipe.Recipe, host_keys.Keys):
        yield from ((f.name,) for f in fields(cls))
    for section, (cls, _) in SECTIONS.items():
        yield from ((section, f.name) for f in fields(cls))
    yield from (("curriculum", "advance", f.name) for f in fields(curriculum.AdvanceRule))
    yield from (("drop_condition", name) for name in ("null", "cond", "text", "keep"))
    yield from (("objective", name) for name in ("type", "weight", "target"))
    yield ("self",)
    yield ("guidance", "self")


KEYS = tuple(all_keys())


def config_of(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A config with one key set."""
    config: dict[str, Any] = {}
    put(config, path, value)
    if path == ("guidance", "mode"):
        config["guidance"].pop("scale")
    return config


def put(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for i, name in enumerate(path[:-1]):
        default = SECTIONS[name][1] if i == 0 and name in SECTIONS else {}
        if name == "objective":
            default = dict(type="perflow_consistency")
        if not isinstance(config.get(name), dict):
            config[name] = dict(default)
        config = config[name]
    config[path[-1]] = value


PLAUSIBLE: tuple[Callable[[random.Random], Any], ...] = (
    lambda r: r.choice([1, 2, 3, 4, 8]),
    lambda r: round(10 ** r.uniform(-3, 2), 3),
    lambda r: r.random(),
    lambda r: r.random() < 0.5,
    lambda r: None,
    lambda r: r.choice([0, 1, 0.0, 1.0, 1000, 100]),
    lambda r: sorted({0.0, 1.0, *(r.random() for _ in range(r.randint(0, 4)))}, reverse=True),
    lambda r: sorted(round(r.uniform(0, 9), 2) for _ in range(r.choice([1, 2, 2, 4]))),
    lambda r: r.choice([[4, 2], [4, 2, 1], [2, 1], [8, 4, 2], (5, 6)]),
    lambda r: r.choice(
        [*host_keys.PATHS, *host_keys.SAMPLING_GRIDS, "v1.2", "v1.3", "uniform", "logit-normal", *host_keys.NOISE_SCHEDULES,
         *recipe.SOLVERS, *recipe.GUIDANCE_MODES, *recipe.STARTS, "velocity", "ddim_eps", "diff_eps", "original", "previous",
         "perflow", "perflow_consistency", "perflow_direction", "perflow_phased", "solution"]
    ),
)  # fmt: skip


def random_config(r: random.Random) -> dict[str, Any]:
    """A few keys, with values that are taken where they stand alone, and now and then an odd one."""
    config: dict[str, Any] = {}
    for path in r.sample(KEYS, r.choice([1, 2, 3, 4, 6, 10])):
        if path[-1] != "self" or r.random() < 0.1:
            odd = r.random() < 0.05
            put(config, path, r.choice(VALUES)() if odd else fitting(path, r))
    return config


def fitting(path: tuple[str, ...], r: random.Random) -> Any:
    """A value that the scheduler takes where nothing else is set, if it can be found in a few tries."""
    for _ in range(20):
        value = r.choice(PLAUSIBLE)(r)
        try:
            PeRFlow(**config_of(path, value))
        except Exception:
            continue
        return value
    return value


# --- one trial ---


class Hang(BaseException):
    """Not a ValueError, and nothing that the package catches."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"over {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def try_config(config: Mapping[str, Any]) -> tuple[str, str]:
    """(outcome, what went wrong) of one config."""
    with within(SECONDS):
        try:
            scheduler = PeRFlow(**config)
        except ValueError:
            return "refused", ""
        copy.deepcopy((scheduler.recipe, scheduler.keys))
        json.dumps([asdict(scheduler.recipe), asdict(scheduler.keys)])
        len(scheduler.grid)
    settings = scheduler.recipe
    stages = 1 if settings.curriculum is None else 4
    evaluations = settings.windows.num_windows * settings.teacher_steps * stages + settings.times_a_solve
    names_files = settings.teacher.from_pretrained is not None or settings.guidance.negative is not None
    if evaluations > MOST_EVALUATIONS or names_files:
        return "accepted", ""
    with within(SECONDS_WITH_A_STEP):
        try:
            loss = train(scheduler)
        except ValueError:
            return "told", ""
        text = scheduler.state().to_json()
        json.loads(text, parse_constant=lambda name: (_ for _ in ()).throw(TypeError(f"{name} in the state")))
    return ("trained", "") if loss.isfinite().all() else ("nan", f"loss {loss.tolist()}")


def train(scheduler: PeRFlow) -> torch.Tensor:
    """One training step of a small network, of the process that the config names."""
    torch.manual_seed(0)
    network = tiny_network().train()
    x, args = batch(network)
    if scheduler.keys.path == "ddpm":
        epsilon = Epsilon()
        args = {"y": torch.randn(2, 1, 10, 32), "mask": torch.ones(2, 10, dtype=torch.long)}
        return scheduler.training_losses(epsilon, x, args)["loss"]
    return scheduler.training_losses(network, x, args)["loss"]


def start_worker() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    limit = 12 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def one_value(number: int) -> tuple[str, str, str]:
    path, i = KEYS[number // len(VALUES)], number % len(VALUES)
    return trial(f"{'.'.join(path)}, value {i}", lambda: config_of(path, VALUES[i]()))


def one_config(seed: int) -> tuple[str, str, str]:
    return trial(f"config {seed}", lambda: random_config(random.Random(seed)))


def trial(name: str, make: Callable[[], Mapping[str, Any]]) -> tuple[str, str, str]:
    config: Mapping[str, Any] = {}
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            config = make()
            outcome, problem = try_config(config)
    except Hang as error:
        outcome, problem = "hang", str(error)
    except BaseException as error:
        outcome, problem = "crash", f"{type(error).__name__}: {str(error)[:100]}"
    if outcome not in FAULTS:
        return outcome, name, problem
    try:
        shown = repr(config)[:150]
    except Exception:
        shown = "?"
    return outcome, name, f"{problem} -- {shown}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["configs", "values"], required=True)
    parser.add_argument("--count", type=int, default=10_000, help="random configs")
    parser.add_argument("--seed", type=int, default=0, help="of the first random config; the others count on from there")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--show", type=int, default=20, help="faults to show")
    args = parser.parse_args()
    if args.what == "values":
        trials, numbers = one_value, range(len(KEYS) * len(VALUES))
    else:
        trials, numbers = one_config, range(args.seed, args.seed + args.count)
    with multiprocessing.get_context("spawn").Pool(args.processes, start_worker) as pool:
        found = list(pool.imap_unordered(trials, numbers, chunksize=20))
    counts = Counter(outcome for outcome, _, _ in found)
    print(f"{args.what}: {len(numbers)} ({len(KEYS)} keys); " + ", ".join(f"{n} {name}" for name, n in counts.most_common()))
    faults = sorted(line for line in found if line[0] in FAULTS)
    for outcome, name, problem in faults[: args.show]:
        print(f"  {outcome}: {name}: {problem}")
    print(f"{sum(counts[name] for name in FAULTS)} faults: " + ", ".join(f"{name} {counts[name]}" for name in FAULTS))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
