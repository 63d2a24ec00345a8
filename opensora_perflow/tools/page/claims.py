"""What few-step students are said to do, beside what a run measured."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from opensora_perflow.tools.page.runs import Run

MOTION = (0.8, 1.25)
"""Share of the teacher's motion within which a window counts as moving alike."""
SURE = 2.0
"""Standard errors by which two errors differ."""


@dataclass(frozen=True)
class Claim:
    """holds: None where the measurement does not decide."""

    text: str
    expected: str
    measured: str
    holds: bool | None


def claims(run: Run) -> list[Claim]:
    """All that the run's files decide something about."""
    return [*_of_samples(run), *_of_motion(run), *_of_training(run)]


def _of_samples(run: Run) -> Iterator[Claim]:
    student = run.sampler("student")
    if student is None:
        return
    if run.edges:
        count = len(run.edges) - 1
        yield Claim("One evaluation a window", f"{count} evaluations", f"{student['nfe']}", student["nfe"] == count)
    twice = run.sampler("teacher", 2 * student["nfe"])
    if twice is not None:
        for key, what in (("energy_distance", "Nearer to the teacher's distribution"), ("endpoint_error", "Errs less")):
            if student.get(key) is None or twice.get(key) is None:
                continue
            yield Claim(
                f"{what} than the teacher with twice the evaluations", f"below {twice[key]:.4g}", f"{student[key]:.4g}",
                student[key] < twice[key],
            )  # fmt: skip
    share = student.get("as_described")
    if share is not None:
        least = min(row.get("as_described") or 0 for row in run.samplers if row["sampler"].startswith("teacher"))
        yield Claim("Shows what the prompts say", f"as often as the teacher, {least:.0%}", f"{share:.0%}", share >= least)


def _of_motion(run: Run) -> Iterator[Claim]:
    shares = run.motion_shares
    if shares:
        within = all(MOTION[0] <= share <= MOTION[1] for share in shares)
        expected = f"{MOTION[0]:.0%} to {MOTION[1]:.0%} in each window"
        yield Claim("Moves as the teacher does", expected, ", ".join(f"{share:.0%}" for share in shares), within)


def _of_training(run: Run) -> Iterator[Claim]:
    count = len(run.history) // 5
    if count >= 4:
        parts = np.array(run.history[:count]), np.array(run.history[-count:])
        first, last = (float(part.mean()) for part in parts)
        spread = float(np.sqrt(sum(part.var(ddof=1) / count for part in parts)))
        yield Claim("The loss falls", f"below {first:.4g}, the first fifth's mean", f"{last:.4g}", _below(last, first, spread))
    rows = [line for line in run.lines("held_out") if line.get("error") is not None and line.get("untrained") is not None]
    if rows:
        row = rows[-1]
        spread = float(np.hypot(row.get("error_se") or 0.0, row.get("untrained_se") or 0.0))
        yield Claim(
            "Nearer to the teacher's end than an untrained student", f"below {row['untrained']:.4g}",
            f"{row['error']:.4g} at step {row['step']}", _below(row["error"], row["untrained"], spread),
        )  # fmt: skip
    if run.steps:
        breaches = len(run.lines("breach"))
        yield Claim("No alarm of the guard", "0", f"{breaches}", breaches == 0)


def _below(value: float, bound: float, spread: float) -> bool | None:
    """None where both are within SURE standard errors."""
    return None if abs(value - bound) <= SURE * spread else value < bound
