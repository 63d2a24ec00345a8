"""`opensora-perflow check` and `opensora-perflow doctor`: is a training config sound, before the GPUs are spent?"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora_perflow.tools.check import check_config
from opensora_perflow.training.findings import Finding, as_json, healthy, table

MOST_STEPS = 8
"""Training steps until weights and EMA must have moved."""


def add_commands(commands: argparse._SubParsersAction) -> None:
    check = commands.add_parser(
        "check",
        help="check a training config without loading weights (seconds)",
        description=(
            "Checks keys, windows, the CSV and its clips against the buckets, paths, the checkpoint to load and its "
            "windows, the\nteacher, the Open-Sora version and the disk. Loads no weights and needs no GPU."
        ),
        epilog=(
            "example: opensora-perflow check configs/opensora/perflow_stage1.py -- --data-path videos.csv\n"
            "status: 0 all is well, 1 a check failed, 2 the command line is wrong"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor = commands.add_parser(
        "doctor",
        help="check a training config with its networks and data: the first steps of Open-Sora's own train.py",
        description=(
            "Runs `check` and `estimate`, and then Open-Sora's own train.py for its first steps, as it will run: with VAE,\n"
            "text encoder, booster and data. Looks at teacher, student, windows, guidance, masks, targets, optimizer and EMA.\n"
            "What the script writes is removed. As many processes as training has:\n"
            "torchrun --nproc_per_node 8 -m opensora_perflow doctor ..."
        ),
        epilog=(
            "examples:\n"
            "  opensora-perflow doctor configs/opensora/perflow_stage1.py --open-sora ../Open-Sora -- --data-path videos.csv\n"
            "  opensora-perflow check configs/opensora/perflow_stage1.py -- --data-path videos.csv\n"
            "status: 0 all is well, 1 a check failed, 2 the command line is wrong"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for parser in (check, doctor):
        parser.add_argument("config", type=Path, metavar="CONFIG", help="config of train.py")
        parser.add_argument("--open-sora", type=Path, metavar="ROOT", help="Open-Sora checkout (default: the installed one)")
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
        parser.usage = f"opensora-perflow {parser.prog.split()[-1]} [-h] [--open-sora ROOT] [--json] CONFIG [-- ARGS]"


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line of `check` or `doctor`, and train.py's own after `--`; argparse takes no list after CONFIG and options."""
    arguments = list(arguments)
    at = arguments.index("--") if arguments[:1] in (["check"], ["doctor"]) and "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def check(args: dict[str, Any]) -> int:
    """`check` with parsed arguments; the exit status."""
    return _show(check_config(**_subject(args)), args["json"])


def doctor(args: dict[str, Any]) -> int:
    """`doctor` with parsed arguments; the exit status.

    Raises:
        ValueError: there is no Open-Sora.
    """
    findings = check_config(**_subject(args))
    if healthy(findings):
        with _start_estimate(args["config"], args["open_sora"]) if _is_first() else nullcontext() as counting:
            with redirect_stdout(sys.stderr):  # the script's own words
                findings += first_steps(**_subject(args))
            if counting is not None:
                findings.append(estimated(*counting.communicate()))
    else:
        findings.append(Finding("first steps", None, "not run before the above is mended"))
    return _show(findings, args["json"])


def first_steps(config: Path, root: Path | None, arguments: Sequence[str]) -> list[Finding]:
    """What the first steps of train.py show.

    Raises:
        ValueError: there is no Open-Sora.
    """
    from opensora_perflow.hosts.install import imported_tree
    from opensora_perflow.hosts.training_script import Enough, script_of
    from opensora_perflow.hosts.training_script import first_steps as run_first_steps
    from opensora_perflow.run import prepare
    from opensora_perflow.training.examination import Case, aliveness, examine

    root = root or imported_tree()
    if root is None:
        raise ValueError("Open-Sora cannot be imported; name its checkout: --open-sora ROOT")
    script = script_of(root)
    prepare(str(script))
    findings: list[Finding] = []
    runs: list[Any] = []

    def examiner(run: Any, batch: Any, model: nn.Module) -> None:
        if not runs:
            runs.append(run)
            run.observer.measures = True
            findings.extend(examine(Case(run, batch, model)))
            run.looked = True  # a teacher that is refused is one of the findings
        seen = run.observer.seen
        moved = len(seen) > 1 and seen[-1].update > 0 and not seen[-1].ema_update == 0.0
        if moved or len(seen) >= MOST_STEPS:
            raise Enough

    problem = ""
    try:
        run_first_steps(script, config, arguments, examiner)
    except Exception as error:  # whatever the script, its data or its packages raise is a finding
        problem = f"{type(error).__name__}: {error}"
    except SystemExit as error:
        problem = "" if error.code in (None, 0) else f"train.py ended with {error.code}"
    if not runs:
        problem = problem or "train.py ended before its first training step"
    findings.append(
        Finding("train.py", not problem, problem or "runs", "runs", "follow the message; docs/troubleshooting.md has more")
    )
    if runs and len(runs[0].observer.seen) > 1:
        findings += aliveness(runs[0])
    return findings


def _start_estimate(config: Path, root: Path | None) -> subprocess.Popen[str]:
    """`estimate` in a process of its own: one that counts on the meta device cannot train."""
    command = [sys.executable, "-m", "opensora_perflow", "estimate", str(config), "--json"]
    command += ["--gpus", os.environ.get("WORLD_SIZE", "1"), *(() if root is None else ("--open-sora", str(root)))]
    if torch.cuda.is_available():
        command += ["--memory", str(torch.cuda.get_device_properties(0).total_memory / 2**30)]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alone)


def estimated(answer: str, errors: str) -> Finding:
    """What `estimate --json` printed on its two streams, as a finding; skipped where no GPU is there to compare with."""
    try:
        found = json.loads(answer[answer.index("{") :])
        largest = max(found["buckets"], key=lambda row: row["peak"])
    except ValueError:
        said = errors.strip().splitlines() or ["nothing"]
        return Finding("estimate", None, f"not counted: {said[-1].removeprefix('opensora-perflow: ')}")
    resident, peak = sum(found["parts"].values()) / 2**30, largest["peak"] / 2**30
    measured = (
        f"counted for {found['gpus']} GPU: {resident:.2f} GiB stay on each, {peak:.2f} at the peak of a step "
        f"({largest['bucket']}, batch {largest['batch']})"
    )
    if not torch.cuda.is_available():
        return Finding("estimate", None, measured)
    too_much = [f"{row['bucket']}: {'; or '.join(row['changes'])}" for row in found["buckets"] if row["changes"]]
    limit = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Finding("estimate", not too_much, measured, f"at most 95 % of {limit:.1f} GiB", " | ".join(too_much))


def _subject(args: dict[str, Any]) -> dict[str, Any]:
    return {"config": args["config"], "root": args["open_sora"], "arguments": args["host_arguments"]}


def _show(findings: Sequence[Finding], as_json_text: bool) -> int:
    if _is_first():
        print(json.dumps(as_json(findings), indent=1) if as_json_text else table(findings))
    return 0 if healthy(findings) else 1


def _is_first() -> bool:
    """Is this the process that speaks? Under torchrun the others see the same, on samples of their own."""
    return os.environ.get("RANK", "0") == "0"
