"""`opensora-perflow`: the command line."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_perflow import __version__

if TYPE_CHECKING:
    from opensora_perflow.hosts.install import Status


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status.

    A user's mistake is one line on stderr and status 2, and Ctrl-C one line and status 130; neither is a traceback.
    """
    try:
        return _run(arguments)
    except (ValueError, OSError) as error:
        print(f"opensora-perflow: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # A terminal shows ^C at the end of a progress bar.
        begin = "\n" if sys.stderr.isatty() else ""
        print(f"{begin}opensora-perflow: stopped by Ctrl-C; files that were complete before are kept", file=sys.stderr)
        return 130


def _run(arguments: Sequence[str] | None) -> int:
    from opensora_perflow.tools import delta as delta_command
    from opensora_perflow.tools import doctor as doctor_command
    from opensora_perflow.tools import estimate as estimate_command
    from opensora_perflow.tools import plan as plan_command
    from opensora_perflow.tools import store as store_command
    from opensora_perflow.tools.studio import command as studio_command

    parser = argparse.ArgumentParser(
        prog="opensora-perflow",
        description="Few-step video generation for Open-Sora with Piecewise Rectified Flow (PeRFlow, arXiv:2405.07510).",
        epilog="Training and sampling inside Open-Sora go through its own scripts; see README.md.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(commands)
    _add_report(commands)
    _add_install(commands)
    _add_embed(commands)
    _add_merge(commands)
    _add_export(commands)
    delta_command.add_commands(commands)
    estimate_command.add_commands(commands)
    plan_command.add_commands(commands)
    store_command.add_commands(commands)
    doctor_command.add_commands(commands)
    studio_command.add_commands(commands)
    own, host_arguments = doctor_command.split(sys.argv[1:] if arguments is None else arguments)
    args = vars(parser.parse_args(own))
    if args["command"] is None:
        parser.print_help()
        return 0
    if args["command"] in ("check", "doctor"):
        args["host_arguments"] = host_arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    known = {"plan": plan_command.plan, "curve": plan_command.curve, **_COMMANDS}
    known |= {"encode": store_command.encode, "store": store_command.store}
    known |= {"delta": delta_command.run, "estimate": estimate_command.run}
    known |= {"check": doctor_command.check, "doctor": doctor_command.doctor, "ui": studio_command.ui}
    return known[args.pop("command")](args)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    defaults = {
        "iterations": "training steps, >= 1; more is better",
        "batch_size": "clips per training step, >= 1",
        "lr": "learning rate, > 0",
        "num_clips": "clips to write where no --videos are given, >= 1",
        "num_samples": "samples that are compared, >= 2",
        "teacher_iterations": "with --open-sora of 2.0: training steps of its teacher, >= 1",
        "guidance_scale": "guidance of the teacher, folded into the student, >= 0",
        "seed": "of clips, noise and training, >= 0",
    }
    parser = commands.add_parser(
        "demo",
        help="train a 4-step student of a tiny video model and compare it with its teacher (minutes, no GPU)",
        description=(
            "Distils a tiny text-to-video teacher that ships with the package into a student that samples in 4 network\n"
            "evaluations, through the same scheduler object that Open-Sora uses. Writes report.html, side_by_side.mp4,\n"
            "frames.png, training.png, record.jsonl, results.json and student.safetensors. About two minutes of one CPU core."
        ),
        epilog="example: opensora-perflow demo --out my_demo --iterations 600",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--videos", type=Path, help="folder of videos, or a CSV with path and text (default: write moving shapes)"
    )
    parser.add_argument("--out", type=Path, default=Path("perflow_demo"), help="folder to write to (default perflow_demo)")
    parser.add_argument(
        "--open-sora", type=Path, metavar="ROOT", help="use this Open-Sora checkout's own class, STDiT3 or MMDiT"
    )
    from opensora_perflow.tools.demo_settings import QUICK, DemoSettings

    less = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"one minute, for a first look: {less}")

    for field in dataclasses.fields(DemoSettings):
        if field.name in defaults:
            option = "--" + field.name.replace("_", "-")
            parser.add_argument(
                option,
                type=type(field.default),
                default=argparse.SUPPRESS,
                help=f"{defaults[field.name]} (default {field.default})",
            )


def _demo(args: dict) -> int:
    from opensora_perflow.tools import report
    from opensora_perflow.tools.demo import run
    from opensora_perflow.tools.demo_models import has_mmdit
    from opensora_perflow.tools.demo_settings import QUICK, DemoSettings

    if "num_clips" in args and args["videos"] is not None:
        raise ValueError("--num-clips is of clips that the demo writes, and --videos takes yours; leave one of the two out")
    if "teacher_iterations" in args and not has_mmdit(args["open_sora"]):
        raise ValueError(
            "--teacher-iterations is of the teacher that the demo trains for Open-Sora 2.0, and here a teacher is there; name "
            "a checkout of 2.0 with --open-sora, or leave the option out"
        )
    settings = DemoSettings(**((QUICK if args.pop("quick") else {}) | args))
    result = run(settings)
    print(f"\n{report.table(result)}\n")
    print(f"{result['seconds']:.0f} s in all, {result['cpu_seconds']:.0f} of a CPU. Written to {settings.out}/:")
    for name, what in {
        "report.html": "all of it on one page, to open in a browser",
        "side_by_side.mp4": "the same noise and prompts through each sampler",
        "frames.png": "some of their frames",
        "training.png": "the loss, and the error and the motion of one step across each window",
        "results.json": "the numbers above and more",
        "student.safetensors": "the student: the average of its weights in training",
    }.items():
        print(f"  {name:20} {what}")
    return 0


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="one HTML page about a run, or several beside each other: videos, quality, windows, training, settings",
        description=(
            "Reads what runs left in their folders and writes one page that opens from disk and loads nothing else: a demo's\n"
            "results.json, a training's record.jsonl and perflow.json, the curve.json of `opensora-perflow curve --out RUN`,\n"
            "and MP4 files in RUN and RUN/samples."
        ),
        epilog="examples:\n  opensora-perflow report perflow_demo\n  opensora-perflow report outputs/a outputs/b --out ab.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a demo or of a training")
    parser.add_argument("--out", type=Path, help="file (default: report.html in RUN; of several runs, in this folder)")


def _report(args: dict) -> int:
    from opensora_perflow.tools.page.render import report

    print(f"written to {report(args['runs'], args['out'])}; open it in a browser")
    return 0


def _add_install(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "install",
        help="register perflow in an Open-Sora checkout and put the configs into it, or undo that",
        description=(
            "Puts two things into an Open-Sora checkout (v1.0.0, v1.1.0, v1.2.0, v1.3 or 2.0; which one is found out):\n"
            "  1. one line in opensora/schedulers/__init__.py that registers perflow, so that any config may change its\n"
            '     scheduler to type="perflow" and nothing else. From then on Open-Sora needs this package to be installed.\n'
            "     2.0 needs no such line;\n"
            "  2. this package's configs, as configs/opensora/perflow_*.py and configs/opensora/_base_/*.py; in 2.0 as\n"
            "     configs/diffusion/train/perflow_*.py and configs/diffusion/inference/perflow_*.py.\n"
            "No file is overwritten, a second run changes nothing, after a failure nothing is left, and --uninstall leaves\n"
            "`git status` as it was before. Needs git on PATH; ROOT itself need not be a repository."
        ),
        epilog=(
            "examples:\n"
            "  opensora-perflow install ../Open-Sora\n"
            "  cd ../Open-Sora && torchrun scripts/train.py configs/opensora/perflow_stage1.py --data-path videos.csv\n"
            "  opensora-perflow install --check ../Open-Sora && echo ready\n"
            "  opensora-perflow install --uninstall ../Open-Sora\n"
            "status: 0 done, or --check found everything; 1 --check found something missing; 2 refused, with the reason"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder of the checkout, the one that holds opensora/")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--copy", action="store_true", help="copy the configs, to edit them there (default: link them)")
    action.add_argument("--check", action="store_true", help="say what is installed; change nothing")
    action.add_argument("--uninstall", action="store_true", help="take everything out that this command put in")


def _install(args: dict) -> int:
    from opensora_perflow.hosts import install

    root = args["root"]
    if args["check"]:
        return _print_status(root, install.check(root))
    tag = install.find_tag(root)
    if args["uninstall"]:
        done = install.uninstall(root)
        print(f"Open-Sora {tag} at {root}: perflow was {'taken out' if done else 'not installed, nothing to do'}")
        return 0
    done = install.install(root, copy=args["copy"])
    print(f"Open-Sora {tag} at {root}: perflow was {'installed' if done else 'installed already, nothing to do'}")
    imported = install.imported_tree()
    if imported is not None and imported != root.resolve():
        print(
            f"note: this Python imports opensora from {imported}, which is another tree; change that by `pip install -e {root}`"
        )
    return 0


def _print_status(root: Path, status: Status) -> int:
    present = "not installed" if status.record is None else "copied" if status.record.copied else "linked"
    number = 0 if status.record is None else len(status.record.configs) - len(status.missing)
    print(f"Open-Sora {status.tag} at {root}: perflow is {'' if status.complete else 'not (fully) '}installed")
    if status.registers is not None:
        print(f"  registering line  {'there' if status.registers else status.conflict or 'not there'}")
    print(f"  configs           {present}" + (f", {number} of {len(status.record.configs)}" if status.record else ""))
    if status.record is not None:
        for what, names in {"missing": status.missing, "edited": status.edited}.items():
            for name in names:
                print(f"  {what:17} {name}")
        if status.outdated:
            print(f"  outdated          from version {status.record.version} or another folder of this package; install again")
    return 0 if status.complete else 1


def _add_embed(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "embed",
        help="write a negative prompt's embedding, to fold it into a student",
        description=(
            "Encodes a prompt with the text encoder of an Open-Sora config and writes it as safetensors, for\n"
            'scheduler = dict(type="perflow", guidance=dict(mode="fixed", scale=7.0, negative="negative.safetensors"), ...).\n'
            "In training the teacher is then guided away from that prompt instead of from the empty one."
        ),
        epilog='example: opensora-perflow embed train_config.py "blurry, low quality" --open-sora ../Open-Sora',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="config that the student will be trained with")
    parser.add_argument("prompt", metavar="PROMPT", help="the negative prompt")
    parser.add_argument("--out", type=Path, default=Path("negative.safetensors"), help="file (default negative.safetensors)")
    parser.add_argument("--open-sora", type=Path, metavar="ROOT", help="Open-Sora checkout (default: the installed one)")


def _embed(args: dict) -> int:
    from opensora_perflow.hosts.v1.embed import embed

    embed(**args)
    print(f"written to {args['out']}")
    return 0


def _add_merge(commands: argparse._SubParsersAction) -> None:
    from opensora_perflow.tools.layouts import LAYOUTS

    parser = commands.add_parser(
        "merge",
        help="write adapters (LoRA) and their base as the weights of one network",
        description=(
            'Adds what a training with model=dict(type="perflow_lora"), or lora_config in 2.0, learned to the weights that\n'
            "it started from, and writes a network that the base's own type loads, with its perflow.json."
        ),
        epilog=(
            "example: opensora-perflow merge outputs/000-perflow_lora/epoch0-global_step4000 student \\\n"
            "             --base hpcai-tech/OpenSora-STDiT-v3"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder epochE-global_stepG; of 2.0 an export too")
    parser.add_argument("out", type=Path, metavar="OUT", help=f"not there yet: {LAYOUTS}")
    parser.add_argument("--base", required=True, metavar="WEIGHTS", help="the weights that the training started from")
    _add_ema(parser)


def _merge(args: dict) -> int:
    from opensora_perflow.tools.merge import merge

    merge(**_checked_ema(args))
    print(f"written to {args['out']}; sample it with --ckpt-path (Open-Sora 2.0: --ckpt_path) {args['out']}")
    return 0


def _add_ema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the average of the training's weights (default), or with --no-ema those of the checkpoint's own step",
    )


def _checked_ema(args: dict) -> dict:
    """The arguments with --ema as it is meant: where it is asked for, there has to be an average."""
    from opensora_perflow.training.state import averages_beside

    if args["ema"] and averages_beside(args["checkpoint"]) is None:
        raise ValueError(f"{args['checkpoint']} has no averaged weights beside it; leave --ema out, or name a checkpoint")
    return args | {"ema": args["ema"] is not False}


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="write a training's averaged weights (EMA), the student, as a checkpoint to sample and to go on from",
        description=(
            "Writes OUT/model/model.safetensors (of Open-Sora 2.0's LoRA: OUT/lora/) and OUT/perflow.json: a checkpoint\n"
            "folder that --ckpt-path of Open-Sora 1.0 to 1.3, --ckpt_path and --pretrained_lora_path of 2.0 take. Adapters\n"
            "stay adapters; `opensora-perflow merge` adds them to their base."
        ),
        epilog=(
            "example: opensora-perflow export outputs/000-STDiT3-XL-2/epoch0-global_step4000 --out student\n"
            "         python scripts/inference.py configs/opensora/perflow_inference.py --ckpt-path student"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder epochE-global_stepG")
    parser.add_argument("--out", type=Path, default=Path("student"), help="folder to write, not there yet (default student)")
    _add_ema(parser)


def _export(args: dict) -> int:
    from opensora_perflow.tools.export import export

    export(**_checked_ema(args))
    part = "lora" if (args["out"] / "lora").is_dir() else ""
    option = "--pretrained_lora_path" if part else "--ckpt-path (Open-Sora 2.0: --ckpt_path)"
    print(f"written to {args['out']}/; sample it with {option} {args['out'] / part}")
    return 0


_COMMANDS = {"demo": _demo, "install": _install, "embed": _embed, "merge": _merge, "export": _export, "report": _report}

if __name__ == "__main__":
    sys.exit(main())
