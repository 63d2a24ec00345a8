"""`opensora-perflow ui`."""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

from opensora_perflow.checks import whole

DEMO = Path("perflow_demo")


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `ui`."""
    parser = commands.add_parser(
        "ui",
        help="a page in the browser: sample a tiny student beside its teacher, train one, watch a run",
        description=(
            "Serves a page at 127.0.0.1: type a prompt, choose 1 to 16 steps, see student and teacher from the same noise\n"
            "with their network evaluations and CPU seconds, and a run's charts while it trains. Students are those of the\n"
            "demo and of the tiny configs. Needs no GPU and, once installed, no internet."
        ),
        epilog="examples:\n  opensora-perflow ui\n  opensora-perflow ui outputs/000-perflow_tiny_stdit3 --port 8000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", type=Path, nargs="*", metavar="RUN", help="more folders of demos, trainings or checkpoints to choose from"
    )
    parser.add_argument("--out", type=Path, default=DEMO, help=f"demo that the page shows and trains (default {DEMO})")
    parser.add_argument("--port", type=int, help="of 127.0.0.1 (default: the first free one from 7860 on)")
    parser.add_argument(
        "--share", action="store_true", help="also a public address through gradio's servers: whoever has it can use the page"
    )


def ui(args: dict) -> int:
    """Serve the page.

    Raises:
        ValueError: gradio is not installed, a RUN that is not there, or a port that is none or in use.
    """
    missing = [str(path) for path in args["runs"] if not path.exists()]
    if missing:
        raise ValueError(f"RUN must be there, got {', '.join(missing)}, where nothing is")
    if args["port"] is not None:
        _refuse_port_in_use(whole(1, 65535)("--port", args["port"]))
    print("opensora-perflow ui: loading gradio", file=sys.stderr, flush=True)
    try:
        from opensora_perflow.tools.studio.layout import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the page needs gradio, which is not installed: pip install 'opensora_perflow[ui]'") from error
    from opensora_perflow.tools.studio.runs import find_runs
    from opensora_perflow.tools.studio.students import find_students

    for path in args["runs"]:
        if not find_students([path]) and not find_runs([path]):
            print(f"opensora-perflow ui: {path} has no student and no run yet; the page looks again", file=sys.stderr)
    serve([args["out"], *args["runs"]], args["out"], args["port"], args["share"], _say)
    return 0


def _refuse_port_in_use(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one whose server has just ended is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(f"--port {port} of 127.0.0.1 cannot be used ({error.strerror}); name another, or none") from error


def _say(address: str) -> None:
    print(f"the studio is at {address}; Ctrl-C ends it", flush=True)
