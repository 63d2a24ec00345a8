"""Does a training run blame the right one, and does it keep quiet where nothing is wrong?

    python benchmarks/faults_training.py --what watch [--runs 10] [--steps 60] [--rate 2e-4]
    python benchmarks/faults_training.py --what blame [--runs 10]

On the tiny video model with its trained weights and real clips, CPU, minutes.

watch   Runs of batch 4: what the lines of `watch` say. Healthy is the demo's learning rate, 2e-4; a rate that is too high shows
        that warnings still come.
blame   The first step's look at the teacher: six teachers that are wrong, each named or not, and healthy runs of the video
        model and of the mixture, from other seeds and batch sizes.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from worlds import MixtureWorld, VideoWorld, World

from opensora_perflow import PeRFlow

SCALE = dict(mode="fixed", scale=3.0)


class Lines(logging.Handler):
    """The log of one run."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def __enter__(self) -> Lines:
        logger = logging.getLogger("opensora_perflow")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(self, *raised: object) -> None:
        logging.getLogger("opensora_perflow").removeHandler(self)

    def warnings(self) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelno >= logging.WARNING]


def train(world: World, steps: int, rate: float, seed: int, batch_size: int = 4, **settings: Any) -> Lines:
    """A run as the demo's, with a warm-up of 20 steps; what it said."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    scheduler = PeRFlow(windows=4, draws=dict(seed=seed), **{"guidance": SCALE, **settings})
    student = world.student(None)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 20, 1.0))
    with Lines() as lines:
        for _ in range(steps):
            data, args = world.batch(batch_size, generator)
            optimizer.zero_grad()
            scheduler.training_losses(student, data, args)["loss"].mean().backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            warmup.step()
    return lines


def watch(runs: int, steps: int, rate: float) -> None:
    world, alarms = VideoWorld(), 0
    for seed in range(runs):
        lines = train(world, steps, rate, seed)
        alarms += bool(lines.warnings())
        for record in lines.records:
            if "held-out" in record.getMessage():
                print(f"rate {rate:g}, seed {seed}: {record.levelname}: {record.getMessage()}", flush=True)
    print(f"watch: {alarms} of {runs} runs of batch 4 warned, {steps} steps at {rate:g}")


def flipped(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return -output


def other_half(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return torch.cat(output.chunk(2, dim=1)[::-1], dim=1)


def dropped(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return nn.functional.dropout(output, 0.1)


def time_in_0_1(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    x, timestep, *rest = args
    return (x, timestep / 1000, *rest), kwargs


def first_token(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    mask = torch.zeros_like(kwargs["mask"])
    mask[:, 0] = 1
    return args, {**kwargs, "mask": mask}


def after(hook: Callable[..., Tensor]) -> Callable[[nn.Module], Any]:
    return lambda network: network.register_forward_hook(hook)


def before(hook: Callable[..., Any]) -> Callable[[nn.Module], Any]:
    return lambda network: network.register_forward_pre_hook(hook, with_kwargs=True)


WRONG: dict[str, tuple[Callable[[nn.Module], Any], float, str]] = {
    "flipped sign": (after(flipped), 1.0, "its sign is flipped"),
    "wrong half": (after(other_half), 1.0, "the wrong half"),
    "t in 0..1": (before(time_in_0_1), 1.0, "told times in 0..1"),
    "latents x 5": (lambda network: None, 5.0, "the latents are 5 times too large"),
    "first token": (before(first_token), 1.0, "different texts get the same answer"),
    "dropout": (after(dropped), 1.0, "two calls with the same input differ"),
}
"""Name -> what is done to the network, factor of the latents, words that name it."""


def first_line(world: World, batch_size: int, seed: int, spoil: Callable[[nn.Module], Any], factor: float) -> tuple[str, str]:
    """Level and text of what a run says, or refuses with, at its first step."""
    torch.manual_seed(seed)
    student = world.student(None)
    spoil(student)
    data, args = world.batch(batch_size, torch.Generator().manual_seed(1000 + seed))
    with Lines() as lines:
        try:
            PeRFlow(windows=4, guidance=SCALE, draws=dict(seed=seed)).training_losses(student, factor * data, args)
        except ValueError as error:
            return "ERROR", str(error)
    found = [
        record for record in lines.records if "teacher" in record.getMessage() and "fingerprint" not in record.getMessage()
    ]
    return found[0].levelname, found[0].getMessage()


def blame(seeds: range, wrong_seeds: range, wrong_batches: Sequence[int]) -> None:
    """Healthy runs of both worlds with `seeds`, and each wrong teacher with `wrong_seeds` and batches of these sizes."""
    video, mixture = VideoWorld(), MixtureWorld()
    named = tried = 0
    for name, (spoil, factor, words) in WRONG.items():
        for seed, batch_size in product(wrong_seeds, wrong_batches):
            if name == "first token" and batch_size == 1:  # there is no other text to compare with
                continue
            level, text = first_line(video, batch_size, seed, spoil, factor)
            seen = level != "INFO" and words in text
            named, tried = named + seen, tried + 1
            if not seen or len(wrong_seeds) == 1:
                print(f"{name}, seed {seed}, batch {batch_size}: {level}: {text}", flush=True)
    alarms = 0
    for world, sizes in ((video, (4, 16, 2, 1)), (mixture, (4, 16))):
        for seed in seeds:
            level, text = first_line(world, sizes[seed % len(sizes)], seed, lambda n: None, 1.0)
            alarms += level != "INFO"
            if level != "INFO" or len(seeds) <= 10:
                print(f"healthy {world.name}, seed {seed}: {level}: {text}", flush=True)
    print(f"blame: {named} of {tried} wrong teachers named; {alarms} of {2 * len(seeds)} healthy runs warned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("watch", "blame"), required=True)
    parser.add_argument("--runs", type=int, default=10, help="healthy runs of a world")
    parser.add_argument("--first-seed", type=int, default=0, help="of --what blame")
    parser.add_argument("--wrong-seeds", type=int, default=1, metavar="N", help="seeds of each wrong teacher")
    parser.add_argument("--wrong-batches", type=int, nargs="+", default=[4], metavar="B", help="its batch sizes")
    parser.add_argument("--steps", type=int, default=60, help="of --what watch")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of --what watch")
    args = parser.parse_args()
    if args.what == "watch":
        watch(args.runs, args.steps, args.rate)
    else:
        first = args.first_seed
        blame(range(first, first + args.runs), range(first, first + args.wrong_seeds), args.wrong_batches)


if __name__ == "__main__":
    main()
