"""Sixteen faults put into a run: does the doctor, or the guard within 50 steps, name each by its own message?

    python benchmarks/faults.py --what faults [--world mixture video] [--batch 4] [--only "dead EMA"]
    python benchmarks/faults.py --what healthy [--world mixture video] [--runs 10]
    python benchmarks/faults.py --what rollback [--world mixture video]
    python benchmarks/faults.py --what cost [--world video]

faults    Each fault in each world where it has a meaning: who named it, after how many steps, with which words.
healthy   Runs of other seeds with batches of 4 and 16, under the doctor's checks and 50 steps of the guard: false alarms.
rollback  The learning rate rises a hundredfold at step 60 of 200: the held-out error at the end beside a healthy run's, for
          each policy.
cost      Seconds of the guard and the record beside those of a step.

World stdit3 is Open-Sora's own class with the demo's weights: --open-sora ROOT. CPU, OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from faults_training import Lines, after, before, flipped, other_half, time_in_0_1
from torch import Tensor, nn
from worlds import MixtureWorld, VideoWorld, World

from opensora_perflow import PeRFlow
from opensora_perflow.hosts.optimizer import kept, rate_of, scale_rates
from opensora_perflow.hosts.v1.host import OpenSora
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.training.examination import Case, examine
from opensora_perflow.training.plan_file import write_plan
from opensora_perflow.training.run import TrainingRun
from opensora_perflow.training.state import write_state

STEPS = 50
RATES = {"mixture": 1e-3, "video": 2e-4, "stdit3": 2e-4}
SCALE = dict(mode="fixed", scale=3.0)


class Script(OpenSora):
    """What a training script would answer: its optimizer, its EMA, its folder and the checkpoint that it loaded."""

    def __init__(self, folder: Path, student: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.student, self.average, self.optimizer, self.place = student, average, optimizer, folder
        self.loaded: str | None = None
        self.resumed = lambda: None if self.loaded is None else (self.loaded, True)
        self.folder = lambda: self.place
        self.ema = lambda: self.average
        self.rate = lambda: rate_of(self.optimizer)
        self.scale_rate = lambda factor: scale_rates(factor, self.optimizer)
        self.keep_state = lambda: kept([self.student, self.average], self.optimizer)


@dataclass
class Trial:
    """A run and what is wrong with it. words: What names the fault, any of them."""

    name: str
    words: tuple[str, ...]
    worlds: tuple[str, ...] = ("mixture", "video", "stdit3")
    settings: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    spoil: Callable[[nn.Module], Any] = lambda network: None
    data: Callable[[World, Tensor], Tensor] = lambda world, data: data
    begun: Callable[[TrainingRun, PeRFlow, nn.Module], Any] = lambda run, scheduler, student: None
    patched: Callable[[], Any] | None = None
    average: bool = True
    stale: bool = False


def overflow(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return (output * 3e4).half().float() / 3e4


def untiled(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Texts of several lengths, whose masks are repeated a a b b for the doubled batch."""
    mask = kwargs["mask"].clone()
    mask[1::2, 3:] = 0
    return args, {**kwargs, "mask": mask if len(args[0]) == len(mask) else mask.repeat_interleave(2, dim=0)}


def without_text(run: TrainingRun, *_: Any) -> None:
    network = run.teacher.network

    def null(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x, timestep, *rest = args
        y = kwargs.get("y", rest[0] if rest else None)
        empty = module.y_embedder.y_embedding.to(y.dtype).expand_as(y)
        told = {**kwargs, "y": empty}
        if "mask" in told:
            told["mask"] = torch.ones_like(told["mask"])
        return (x, timestep), told

    network.register_forward_pre_hook(null, with_kwargs=True)


def black(world: World, data: Tensor) -> Tensor:
    data = data.clone()
    flat = torch.zeros_like(data[::2])
    data[::2] = flat if data[0, 0].numel() == 1 else flat + data.mean()
    return data


def zeroed(run: TrainingRun, scheduler: PeRFlow, student: nn.Module) -> None:
    objective = scheduler.objective

    def without_one(velocity: Any, segment: Any, t: Tensor, weights: Tensor | None) -> Tensor:
        return objective(velocity, segment, t, weights) * (segment.t_start != 0.75)

    scheduler.objective = without_one


@contextmanager
def swapped_edges() -> Iterator[None]:
    draw = TrainingRun.draw

    def swapped(self: TrainingRun, *args: Any, **options: Any) -> Any:
        drawn = draw(self, *args, **options)
        return replace(drawn, solver_times=drawn.solver_times.flip(0))

    TrainingRun.draw = swapped
    try:
        yield
    finally:
        TrainingRun.draw = draw


@contextmanager
def rounded_lookup() -> Iterator[None]:
    lookup = WarpedWindows.lookup
    WarpedWindows.lookup = lambda self, t: lookup(self, t.bfloat16().double())
    try:
        yield
    finally:
        WarpedWindows.lookup = lookup


def student_teaches(run: TrainingRun, scheduler: PeRFlow, student: nn.Module) -> None:
    run.teacher = replace(run.teacher, network=student)


def in_train_mode(run: TrainingRun, *_: Any) -> None:
    run.teacher.network.train()


VIDEOS = ("video", "stdit3")
FAULTS = (
    Trial("flipped sign", ("its sign is flipped",), spoil=after(flipped)),
    Trial("t in 0..1", ("told times in 0..1",), spoil=before(time_in_0_1)),
    Trial("swapped edges", ("edges are swapped",), patched=swapped_edges),
    Trial("dead EMA", ("the EMA has not changed",), average=False),
    Trial("learning rate x 100", ("the learning rate is probably too high",), rate=100.0),
    Trial("null-text teacher", ("different texts get the same answer", "the empty text for every sample"), begun=without_text),
    Trial("fp16 overflow", ("fp16",), spoil=after(overflow)),
    Trial("static latents", ("do not move", "without motion"), VIDEOS, data=lambda w, x: x[:, :, :1].expand_as(x).clone()),
    Trial("wrong channel half", ("the wrong half",), VIDEOS, spoil=after(other_half)),
    Trial("text mask untiled", ("masks must be tiled",), VIDEOS, spoil=before(untiled)),
    Trial("teacher in train mode", ("in train mode",), begun=in_train_mode),
    Trial("student as teacher", ("the student would teach itself", "the teacher is the student itself"), begun=student_teaches),
    Trial("half of the data black", ("samples are blank", "blank, "), data=black),
    Trial("one window's loss zeroed", ("so that the window learns nothing",), begun=zeroed),
    Trial("stale windows file", ("was trained with other settings: windows was",), stale=True),
    Trial("bf16 lookup", ("looked up in rounded times",), patched=rounded_lookup),
)
HEALTHY = Trial("healthy", ())


def make_world(name: str, open_sora: Path | None) -> World:
    if name == "mixture":
        return MixtureWorld()
    return VideoWorld(open_sora=open_sora if name == "stdit3" else None)


@dataclass
class Outcome:
    """said: (who, step, words) of everything that was seen. seconds: Of all steps, of the guard's part. error: Held-out."""

    said: list[tuple[str, int, str]] = field(default_factory=list)
    seconds: float = 0.0
    guarded: float = 0.0
    error: float = float("nan")


def run(
    world: World,
    trial: Trial,
    seed: int,
    batch_size: int,
    steps: int = STEPS,
    policy: str = "warn",
    spike: int | None = None,
    doctor: bool = True,
    stop: bool = True,
) -> Outcome:
    """One run under the doctor's checks and the guard; `stop`: at the first words of the fault. `spike`: From that step on the
    learning rate is a hundred times as high."""
    outcome, rate = Outcome(), RATES[world.name] * trial.rate
    torch.manual_seed(seed)
    student = world.student(None)
    average = world.student(None).requires_grad_(False)
    average.load_state_dict(student.state_dict())
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    with tempfile.TemporaryDirectory() as folder, Lines() as lines, (trial.patched or _nothing)():
        script = Script(Path(folder), student, average, optimizer)
        settings = {"windows": 4, "guidance": SCALE, "draws": dict(seed=seed), "watch": dict(policy=policy), **trial.settings}
        if trial.stale:
            settings["windows"] = _stale(world, settings, script, Path(folder), student, batch_size)
        scheduler = PeRFlow(**settings)
        scheduler.host = script
        trial.spoil(student)
        TrainingRun.examiner = staticmethod(_examiner(outcome, trial, scheduler, doctor))
        generator = torch.Generator().manual_seed(100 + seed)
        try:
            for step in range(steps):
                began = time.perf_counter()
                warm = min((step + 1) / 20, 1.0)
                if step < 20 or step == spike:
                    for group in optimizer.param_groups:
                        group["lr"] = rate * warm * (100 if step == spike else 1)
                data, args = world.batch(batch_size, generator)
                optimizer.zero_grad()
                scheduler.training_losses(student, trial.data(world, data), args)["loss"].mean().backward()
                nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                if trial.average:
                    with torch.no_grad():
                        for mean, own in zip(average.parameters(), student.parameters()):
                            mean.lerp_(own, 0.01)
                outcome.seconds += time.perf_counter() - began
                outcome.said += [("guard", step + 1, text) for text in lines.warnings()]
                lines.records.clear()
                if stop and named(outcome, trial):
                    break
        except ValueError as error:
            outcome.said.append(("error", len(outcome.said) and step + 1, str(error)))
        finally:
            TrainingRun.examiner = None
        if not stop and scheduler.run is not None:
            held = scheduler.run.monitor.batches
            ends = torch.cat([one.squared_ends(scheduler.run.solver_grids)[0] for one in held])
            outcome.error = ends.mean().sqrt().item()
    return outcome


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _examiner(outcome: Outcome, trial: Trial, scheduler: PeRFlow, doctor: bool) -> Callable[..., None]:
    known: list[TrainingRun] = []

    def examiner(run: TrainingRun, batch: Any, model: nn.Module) -> None:
        if known:
            return
        known.append(run)
        trial.begun(run, scheduler, model)
        _time(run.observer, outcome)
        if doctor:
            failed = [one for one in examine(Case(run, batch, model)) if one.passed is False]
            outcome.said += [("doctor", 0, f"{one.name}: {one.measured}: {one.remedy}") for one in failed]

    return examiner


def _time(observer: Any, outcome: Outcome) -> None:
    after_loss = observer.after_loss

    def timed(*args: Any) -> None:
        began = time.perf_counter()
        after_loss(*args)
        outcome.guarded += time.perf_counter() - began

    observer.after_loss = timed


def _stale(world: World, settings: dict, script: Script, folder: Path, student: nn.Module, batch_size: int) -> str:
    """A run with a plan's file, a checkpoint of it, and another plan in the file since."""
    plan, checkpoint = folder / "plan.json", folder / "epoch0-global_step2"
    write_plan(plan, [1.0, 0.7, 0.4, 0.2, 0.0], [], {})
    first = PeRFlow(**{**settings, "windows": str(plan)})
    first.training_losses(student, *world.batch(batch_size, torch.Generator().manual_seed(0)))
    checkpoint.mkdir()
    write_state(checkpoint, first.state())
    write_plan(plan, [1.0, 0.8, 0.5, 0.3, 0.0], [], {})
    script.loaded = str(checkpoint)
    settings["teacher"] = dict(from_pretrained=_weights(student, folder))
    return str(plan)


def _weights(student: nn.Module, folder: Path) -> str:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in student.state_dict().items()}, folder / "teacher.safetensors")
    return str(folder / "teacher.safetensors")


def named(outcome: Outcome, trial: Trial) -> tuple[str, int, str] | None:
    return next((said for said in outcome.said if any(words in said[2] for words in trial.words)), None)


def faults(world: World, batch_size: int, seed: int, only: str | None) -> list[dict[str, Any]]:
    rows = []
    for trial in FAULTS:
        if world.name not in trial.worlds or (only and trial.name != only):
            continue
        outcome = run(world, trial, seed, batch_size)
        found = named(outcome, trial)
        who, step, text = found or ("nobody", STEPS, "; ".join(said[2][:80] for said in outcome.said))
        others = {said[2].split(":")[0] for said in outcome.said if said is not found}
        rows.append({"fault": trial.name, "world": world.name, "batch": batch_size, "who": who, "step": step, "text": text})
        print(f"{world.name:8} {trial.name:25} {who} after {step} steps: {text[:160]}", flush=True)
        if others:
            print(f"{'':34} also: {'; '.join(sorted(others))[:200]}", flush=True)
    return rows


def healthy(world: World, runs: int, first: int) -> int:
    alarms = 0
    for seed in range(first, first + runs):
        batch_size = (4, 16)[seed % 2]
        outcome = run(world, HEALTHY, seed, batch_size)
        alarms += bool(outcome.said)
        share = outcome.guarded / max(outcome.seconds, 1e-9)
        print(
            f"{world.name} seed {seed} batch {batch_size}: {outcome.said or 'quiet'}; guard {share:.1%} of a step", flush=True
        )
    return alarms


def rollback(world: World, seed: int, batch_size: int, steps: int = 200, spike: int = 60) -> dict[str, float]:
    errors = {"healthy": run(world, HEALTHY, seed, batch_size, steps, stop=False, doctor=False).error}
    for policy in ("rollback", "warn"):
        outcome = run(world, HEALTHY, seed, batch_size, steps, policy, spike, stop=False, doctor=False)
        errors[policy] = outcome.error
        share = errors[policy] / errors["healthy"]
        print(f"{world.name} {policy}: held-out error {outcome.error:.4f}, {share:.3f} of healthy", flush=True)
        print(*(f"    step {step}: {text[:110]}" for _, step, text in outcome.said[:4]), sep="\n", flush=True)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("faults", "healthy", "rollback", "cost"), required=True)
    parser.add_argument("--world", nargs="+", choices=tuple(RATES), default=["mixture", "video"])
    parser.add_argument("--open-sora", type=Path, help="checkout of v1.2.0 or v1.3, for world stdit3")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=10, help="healthy runs of a world")
    parser.add_argument("--only", help="one fault")
    parser.add_argument("--json", type=Path, help="also write the rows of --what faults")
    args = parser.parse_args()
    logging.getLogger("opensora_perflow").propagate = False
    rows: list[dict[str, Any]] = []
    for name in args.world:
        world = make_world(name, args.open_sora)
        if args.what == "faults":
            found = faults(world, args.batch, args.seed, args.only)
            rows += found
            print(f"{name}: {sum(row['who'] != 'nobody' for row in found)} of {len(found)} named", flush=True)
        elif args.what == "healthy":
            print(f"{name}: {healthy(world, args.runs, args.seed)} false alarms in {args.runs} runs", flush=True)
        elif args.what == "rollback":
            rollback(world, args.seed, args.batch)
        else:
            outcome = run(world, HEALTHY, args.seed, args.batch, doctor=False)
            share = outcome.guarded / outcome.seconds
            print(f"{name}, batch {args.batch}: guard and record {1e3 * outcome.guarded / STEPS:.2f} ms, {share:.2%} of a step")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
