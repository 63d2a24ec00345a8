"""`opensora-perflow`: the command line."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. A user's mistake is one line on stderr and status 2, not a traceback."""
    parser = argparse.ArgumentParser(
        prog="opensora-perflow",
        description="Few-step video generation for Open-Sora with Piecewise Rectified Flow (PeRFlow, arXiv:2405.07510).",
        epilog="Training and sampling inside Open-Sora go through its own scripts; see README.md.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    args = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return _COMMANDS[args.pop("command")](args)
    except ValueError as error:
        print(f"opensora-perflow: {error}", file=sys.stderr)
        return 2


def _add_demo(commands: argparse._SubParsersAction) -> None:
    defaults = {
        "iterations": "training steps, >= 1; more is better",
        "batch_size": "clips per training step, >= 1",
        "lr": "peak learning rate, > 0",
        "num_clips": "clips to write where no --videos are given, >= 1",
        "num_samples": "samples that are compared, >= 2",
        "guidance_scale": "guidance of the teacher, folded into the student, >= 0",
        "seed": "of clips, noise and training",
    }
    parser = commands.add_parser(
        "demo",
        help="train a 4-step student of a tiny video model and compare it with its teacher (minutes, no GPU)",
        description=(
            "Distils a tiny text-to-video teacher that ships with the package into a student that samples in 4 network "
            "evaluations, through the same scheduler object that Open-Sora uses. Writes side_by_side.mp4, frames.png, "
            "training.png, results.json and student.safetensors. About 4 minutes on 2 CPU cores."
        ),
        epilog="example: opensora-perflow demo --out my_demo --iterations 600",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--videos", type=Path, help="folder of videos, or a CSV with path and text (default: write moving shapes)"
    )
    parser.add_argument("--out", type=Path, default=Path("perflow_demo"), help="folder to write to (default perflow_demo)")
    parser.add_argument("--open-sora", type=Path, metavar="ROOT", help="use the real STDiT3 class of this Open-Sora checkout")
    from opensora_perflow.demo.run import DemoSettings

    for field in dataclasses.fields(DemoSettings):
        if field.name in defaults:
            option = "--" + field.name.replace("_", "-")
            parser.add_argument(
                option,
                type=type(field.default),
                default=field.default,
                help=f"{defaults[field.name]} (default {field.default})",
            )


def _demo(args: dict) -> int:
    from opensora_perflow.demo.run import DemoSettings, run, table

    settings = DemoSettings(**args)
    result = run(settings)
    print(f"\n{table(result)}\n")
    print(f"{result['seconds']:.0f} s in all. Written to {settings.out}/:")
    for name, what in {
        "side_by_side.mp4": "the same noise and prompts through each sampler",
        "frames.png": "some of their frames",
        "training.png": "the loss, and the error of one step across each window",
        "results.json": "the numbers above and more",
        "student.safetensors": "the student's weights",
    }.items():
        print(f"  {name:20} {what}")
    return 0


_COMMANDS = {"demo": _demo}

if __name__ == "__main__":
    sys.exit(main())
