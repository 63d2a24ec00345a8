"""`opensora-perflow plan` and `opensora-perflow curve`: measure, decide, write what `windows=` reads, draw a picture."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from opensora_perflow.atomic import replacing
from opensora_perflow.checks import check_num_steps, number
from opensora_perflow.method.grids import sampling_grid
from opensora_perflow.method.metrics import endpoint_error, energy_distance
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.planning.extra_steps import grids_by_steps
from opensora_perflow.planning.fine_path import follow
from opensora_perflow.planning.grids import Comparison, choose_grid, compare
from opensora_perflow.planning.windows import CRITERIA, RESOLUTION, plan_windows
from opensora_perflow.run import find_host_root
from opensora_perflow.tools import subjects_v2
from opensora_perflow.tools.subjects import Subject, demo_subject, host_subject
from opensora_perflow.training.plan_file import windows_of, write_plan
from opensora_perflow.training.state import find_state

DEFAULTS = {"steps": [8], "candidates": 32, "criterion": "added"}
"""Of a plan. None before: an option that says nothing there is refused."""
FRESH = 1000
"""Added to the seed for the noise that results are compared on."""

_HOST_ARGUMENTS = (
    "  opensora-perflow {command} --script ../Open-Sora/scripts/inference.py {options} -- \\\n"
    "      {config} --ckpt-path {weights} --prompt-path prompts.txt --batch-size 2\n"
    "A script's own command line follows `--`; it runs up to its first sample, so everything is loaded as it loads it.\n"
)


def add_commands(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser(
        "plan",
        help="find better sampling times for a checkpoint, or better windows for a student; write a plan for windows=",
        description=(
            "Without --windows: measures the teacher's fine path, plans a grid for each --steps by dynamic programming, and\n"
            "compares it with as many uniform steps on fresh noise. The file gets the grids that beat uniform steps; if none\n"
            "does, this says so, writes no file and exits with 1. Nothing is trained. With a student the grids are the\n"
            "student's, and its windows stay in the file.\n"
            "With --windows K: measures what each window of a pilot student (any short run, any windows) adds to its error at\n"
            "the end, and plans K windows that should add the least, for the training that follows. Whether they do, a second\n"
            "pilot tells: the command prints how far a pilot ends from its teacher."
        ),
        epilog=(
            "examples:\n"
            "  opensora-perflow plan --steps 4 8 --out plan.json                 the demo's tiny video model\n"
            "  opensora-perflow plan --windows 8 --student pilot.safetensors --student-windows 4\n"
            + _HOST_ARGUMENTS.format(
                command="plan", options="--steps 8", config="configs/opensora-v1-2/inference/sample.py", weights="CKPT"
            )
            + 'then: scheduler = dict(type="perflow", windows="plan.json", num_sampling_steps=8, ...)'
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_subject(plan)
    plan.add_argument("--steps", type=int, nargs="+", help="step counts to plan grids for (default 8)")
    plan.add_argument("--windows", type=int, metavar="K", help="plan K windows from what a pilot student measures")
    plan.add_argument(
        "--criterion", choices=tuple(CRITERIA),
        help="what windows are planned by: what each adds to the error at the end, or errs by itself (default added)",
    )  # fmt: skip
    plan.add_argument("--candidates", type=int, help="candidate times are multiples of 1/this (default 32)")
    plan.add_argument("--out", type=Path, default=Path("plan.json"), help="file to write; a .png lies beside it")
    curve = commands.add_parser(
        "curve",
        help="quality against network evaluations for 1..N steps of one checkpoint; places the extra steps of a student",
        description=(
            "Samples with 1..--max-steps steps. For a student, grids are grown from its windows by what each further step\n"
            "does to the measured error, compared with the default grids on fresh noise, and written into a plan, so that\n"
            "num_sampling_steps=N uses them. Writes plan.json (student only), curve.json and curve.png."
        ),
        epilog=(
            "examples:\n"
            "  opensora-perflow curve --student perflow_demo/student.safetensors --student-windows 4 --out curve\n"
            + _HOST_ARGUMENTS.format(
                command="curve",
                options="--teacher TEACHER",
                config="../opensora_perflow/configs/opensora/perflow_inference_stage2.py",
                weights="STUDENT",
            )
            + "Without --teacher the script's network is measured against its own fine path.\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_subject(curve)
    curve.add_argument("--max-steps", type=int, default=16, help="largest number of steps (default 16)")
    curve.add_argument("--out", type=Path, default=Path("perflow_curve"), help="folder to write to (default perflow_curve)")


def _add_subject(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("video", "mixture"), help="a model of the demo (default video)")
    parser.add_argument("--student", type=Path, help="weights of a student of that model")
    parser.add_argument(
        "--student-windows",
        nargs="+",
        metavar="K|EDGE|PLAN",
        help="its windows: a number, edges, or a plan's file (default: those that its file names, else 4)",
    )
    parser.add_argument("--guidance-scale", type=float, help="of that model's teacher (default video 3, mixture 2)")
    parser.add_argument(
        "--script", metavar="SCRIPT", help="instead: an Open-Sora inference script, with its arguments after --"
    )
    parser.add_argument(
        "--teacher", type=Path, help="with --script: weights that the script's perflow student was distilled from"
    )
    parser.add_argument("--samples", type=int, default=16, help="noises to measure on, and as many fresh ones (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("host_arguments", nargs="*", metavar="-- ARGS", help="the script's own command line")


def plan(args: dict[str, Any]) -> int:
    """Run `plan` with parsed arguments; returns the exit status.

    Raises:
        ValueError: invalid settings; see plan_subjects.
    """
    _refuse_unused(args)
    args = args | {name: value for name, value in DEFAULTS.items() if args[name] is None}
    for name in ("samples", "candidates"):
        check_num_steps(args[name], f"--{name}")
    for steps in args["steps"]:
        check_num_steps(steps, "--steps")
        if steps > args["candidates"]:
            raise ValueError(f"--steps {steps} needs as many candidate times, got --candidates {args['candidates']}")
    if args["windows"] is not None:
        check_num_steps(args["windows"], "--windows")
        if args["windows"] > RESOLUTION:
            raise ValueError(f"--windows must be at most {RESOLUTION}, got {args['windows']}")
    if args["out"].suffix != ".json":
        raise ValueError(f"--out must end in .json, by which windows= knows a plan, got {str(args['out'])!r}")
    subject = _subject(args)
    return _plan_windows(subject, args) if args["windows"] is not None else _plan_grids(subject, args)


def _refuse_unused(args: dict[str, Any]) -> None:
    """Raises ValueError where an option belongs to the other kind of plan."""
    unused = ("criterion",) if args["windows"] is None else ("steps", "candidates")
    given = [f"--{name}" for name in unused if args[name] is not None]
    if given:
        where = "--windows plans by measured windows, not" if args["windows"] is not None else "there is no --windows for"
        raise ValueError(f"{where} {' and '.join(given)}; leave out one or the other")


def _subject(args: dict[str, Any]) -> Subject:
    if args["guidance_scale"] is not None:
        number(low=0)("--guidance-scale", args["guidance_scale"])
    if args["script"] is not None:
        if args["student"] is not None:
            raise ValueError("with --script the student is the script's own --ckpt-path; name its teacher with --teacher")
        given = [name for name in ("model", "student_windows", "guidance_scale") if args[name] is not None]
        if given:
            raise ValueError(
                f"with --script the script's config says what --{given[0].replace('_', '-')} would; leave the option out"
            )
        is_v2 = (find_host_root(args["script"]) / "scripts" / "diffusion").is_dir()
        make = subjects_v2.host_subject if is_v2 else host_subject
        return make(args["script"], args["host_arguments"], args["teacher"])
    if args["host_arguments"] or args["teacher"] is not None:
        raise ValueError(f"{args['host_arguments'] or '--teacher'} belongs to an inference script; name it with --script")
    windows = _windows(args["student_windows"], args["student"])
    if args["student_windows"] is not None and args["student"] is None:
        raise ValueError("--student-windows are a student's, and there is none; name it with --student, or leave them out")
    return demo_subject(args["model"] or "video", args["student"], windows, args["guidance_scale"])


def _windows(words: Sequence[str] | None, student: Path | None) -> TimeWindows:
    """Windows as the command line writes them, or as the student's file says."""
    if words is None:
        found = None if student is None else find_state(student)
        return TimeWindows.uniform(4) if found is None else TimeWindows(found[0].windows)
    if len(words) == 1 and words[0].isdecimal():
        return windows_of(int(words[0]))
    if len(words) == 1:
        return windows_of(words[0])
    try:
        return windows_of([float(word) for word in words])
    except ValueError as error:
        raise ValueError(f"--student-windows: {error}") from error


def _plan_grids(subject: Subject, args: dict[str, Any]) -> int:
    fine = dict(substeps=max(2, 64 // args["candidates"]), method="heun", progress=True)
    noises = [(args["samples"], args["seed"] + offset) for offset in (0, FRESH)]
    path, other = (follow(subject.teacher(*noise), args["candidates"], **fine) for noise in noises)
    probe, fresh = ((subject.student or subject.teacher)(*noise) for noise in noises)
    windows = TimeWindows((1.0, 0.0) if subject.windows is None else subject.windows.edges)
    found, default = {}, {}
    for steps in args["steps"]:
        grid, predicted = choose_grid(probe, path, steps, progress=True)
        found[steps] = compare(grid, predicted, fresh, other.endpoints)
        default[steps] = endpoint_error(fresh.sample(sampling_grid(windows, steps)), other.endpoints)
    _print_grids(found, subject.branches[subject.student is not None])
    kept = {steps: row for steps, row in found.items() if row.better and row.error < default[steps]}
    also = "" if windows.num_windows == 1 else " and the windows' own"
    for steps in found.keys() - kept.keys():
        print(f"{steps} steps: no grid was found that beats uniform steps{also}; keep num_sampling_steps={steps} as it is")
    _figures().grids_figure(found, args["out"].with_suffix(".png"))
    if not kept:
        print(f"no plan was written; {args['out'].with_suffix('.png')} shows what was tried")
        return 1
    report = {"model": subject.name, "samples": args["samples"], "seed": args["seed"]}
    write_plan(
        args["out"], windows.edges, [row.grid for row in kept.values()],
        {**report, "grids": {str(steps): asdict(row) for steps, row in found.items()}},
    )  # fmt: skip
    first = next(iter(kept))
    print(f"written to {args['out']}: {subject.use.format(out=args['out'], steps=first)}")
    return 0


def _figures() -> ModuleType:
    """Loads matplotlib, which takes a fifth of the time of every command's --help."""
    from opensora_perflow.tools import plan_figures

    return plan_figures


def _print_grids(found: Mapping[int, Comparison], branches: int) -> None:
    print(f"\n{'steps':>5}{'NFE':>5}{'uniform':>10}{'planned':>10}{'predicted':>11}{'gain / se':>11}   grid")
    for steps, row in found.items():
        grid = " ".join(f"{time:.4g}" for time in row.grid)
        errors = f"{row.uniform:10.4f}{row.error:10.4f}{row.predicted:11.4f}{row.gain:11.1f}"
        print(f"{steps:5d}{steps * branches:5d}{errors}   {grid}")
    print("Endpoint errors on noise that no grid was chosen with; predicted: on the noise that it was chosen with.\n")


def _plan_windows(subject: Subject, args: dict[str, Any]) -> int:
    if subject.student is None or subject.windows is None:
        raise ValueError(
            "windows are planned from what a pilot student measures: train one for a short while with any windows and name it "
            "with --student (with --script: its --ckpt-path, and --teacher)"
        )
    edges = subject.windows.edges
    teacher, student = (probe(args["samples"], args["seed"]) for probe in (subject.teacher, subject.student))
    path = follow(teacher, edges, substeps=max(2, -(-64 // (len(edges) - 1))), method="heun", progress=True)
    errors = CRITERIA[args["criterion"]](student, path)
    planned, expected = plan_windows(edges, errors, args["windows"])
    end = endpoint_error(student.sample(edges), path.endpoints)
    meaning = {"added": "adds to its error at the end", "local": "errs by, from the teacher's state"}[args["criterion"]]
    print(f"\nthe pilot ends {end:.4f} from the teacher; its windows, and what each {meaning}")
    _print_windows(edges, errors)
    if args["criterion"] == "added":
        print(f"to draw the pilot's windows by that: draws=dict(shares={[round(error / sum(errors), 4) for error in errors]})")
    print("planned windows, and what is expected of each")
    _print_windows(planned, expected)
    report = {"model": subject.name, "samples": args["samples"], "seed": args["seed"]}
    report |= {"criterion": args["criterion"], "pilot_edges": edges, "pilot_error": end}
    report |= {"pilot_errors": errors, "expected_errors": expected}
    write_plan(args["out"], planned, [], report)
    _figures().windows_figure({"pilot": (edges, errors), "planned": (planned, expected)}, args["out"].with_suffix(".png"))
    print(f'written to {args["out"]}: train with windows="{args["out"]}"')
    return 0


def _print_windows(edges: Sequence[float], errors: Sequence[float]) -> None:
    for start, end, error in zip(edges, edges[1:], errors):
        print(f"  {start:7.4f} -> {end:7.4f}{error:10.4f}")


def curve(args: dict[str, Any]) -> int:
    """Run `curve` with parsed arguments; returns the exit status.

    Raises:
        ValueError: invalid settings; see plan_subjects.
    """
    check_num_steps(args["samples"], "--samples")
    check_num_steps(args["max_steps"], "--max-steps")
    if args["samples"] < 2:
        raise ValueError("--samples must be >= 2, to compare distributions, got 1")
    if args["out"].exists() and not args["out"].is_dir():
        raise ValueError(f"--out must be a folder, got {str(args['out'])!r}, which is a file; name another")
    subject = _subject(args)
    make, windows = (subject.student or subject.teacher), subject.windows or TimeWindows.uniform(1)
    endpoints = {
        offset: follow(subject.teacher(args["samples"], args["seed"] + offset), 64, substeps=2, method="heun", progress=True)
        .endpoints
        for offset in (0, FRESH)
    }  # fmt: skip
    grids = {}
    if subject.student is not None:
        probe = make(args["samples"], args["seed"])
        grown = grids_by_steps(probe, endpoints[0], windows.edges, args["max_steps"], places=(0.5,), progress=True)
        grids = {steps: found.grid for steps, found in grown.items()}
    fresh, rows = make(args["samples"], args["seed"] + FRESH), []
    average = subject.average and subject.average(args["samples"], args["seed"] + FRESH)
    default_windows = TimeWindows(windows.edges)
    for steps in range(1, args["max_steps"] + 1):
        x = fresh.sample(sampling_grid(default_windows, steps))
        row = {"steps": steps, "nfe": steps * subject.branches[subject.student is not None]}
        row |= {"error": endpoint_error(x, endpoints[FRESH]), "energy_distance": energy_distance(x, endpoints[FRESH])}
        if average is not None:
            x = average.sample(sampling_grid(default_windows, steps))
            row |= {"average": endpoint_error(x, endpoints[FRESH]), "average_energy": energy_distance(x, endpoints[FRESH])}
        if steps in grids:
            x = fresh.sample(grids[steps])
            row |= {"planned": endpoint_error(x, endpoints[FRESH]), "planned_energy": energy_distance(x, endpoints[FRESH])}
        rows.append(row)
    print(curve_table(rows))
    out = args["out"]
    out.mkdir(parents=True, exist_ok=True)
    report = {"model": subject.name, "samples": args["samples"], "seed": args["seed"], "rows": rows}
    with replacing(out / "curve.json") as temporary:
        temporary.write_text(json.dumps({**report, "grids": list(grids.values())}, indent=1) + "\n")
    _figures().curve_figure(rows, out / "curve.png")
    if grids:
        write_plan(out / "plan.json", windows.edges, list(grids.values()), report)
        print(f"written to {out}/: {subject.use.format(out=f'{out}/plan.json', steps='N')}")
    return 0


def curve_table(rows: Sequence[dict[str, Any]]) -> str:
    """Steps, evaluations, and the errors of the default grids, of the averaged weights on them, and of the planned grids."""
    columns = [name for name in ("average", "planned") if any(name in row for row in rows)]
    head = f"{'steps':>5}{'NFE':>5}{'error':>10}{'energy':>10}"
    lines = ["", head + "".join(f"{f'{name} error':>16}{'energy':>10}" for name in columns)]
    for row in rows:
        line = f"{row['steps']:5d}{row['nfe']:5d}{row['error']:10.4f}{row['energy_distance']:10.5f}"
        shown = (f"{row[name]:16.4f}{row[f'{name}_energy']:10.5f}" if name in row else " " * 26 for name in columns)
        lines.append((line + "".join(shown)).rstrip())
    return "\n".join([*lines, ""])
