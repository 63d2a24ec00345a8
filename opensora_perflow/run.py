"""Run one of Open-Sora's own scripts, unmodified, with perflow registered and this machine's gaps filled.

python -m opensora_perflow.run SCRIPT [args ...]
torchrun --nproc_per_node 2 -m opensora_perflow.run SCRIPT [args ...]
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import opensora_perflow
from opensora_perflow import portable

HELP = """
Run a script of an Open-Sora checkout as it is, in this order:
  1. the checkout that holds SCRIPT is put on sys.path, so that the script and the package it imports belong together;
  2. what this machine lacks is replaced (see opensora_perflow/portable): one line on stderr says what and why, and on a
     machine with CUDA and the host's own packages there is no such line;
  3. "perflow" is registered in the host's SCHEDULERS, so that any config may say scheduler = dict(type="perflow", ...)
     (Open-Sora 2.0 has none: there the config's custom_imports register what its model is);
  4. SCRIPT runs as if it had been started directly: same sys.argv, same __main__.
Everything after SCRIPT belongs to the script; `... SCRIPT --help` shows its own help.
"""

EXAMPLES = """
examples (ROOT is an Open-Sora checkout):
  train, one process     python -m opensora_perflow.run ROOT/scripts/train.py config.py --outputs outputs
  train, two processes   torchrun --nproc_per_node 2 -m opensora_perflow.run ROOT/scripts/train.py config.py
  continue               ... ROOT/scripts/train.py config.py --load outputs/000-STDiT3-XL-2/epoch0-global_step4
  sample                 python -m opensora_perflow.run ROOT/scripts/inference.py config.py --prompt "a red ball"
  image to video (v1.3)  python -m opensora_perflow.run ROOT/scripts/inference_i2v.py config.py --cond-type i2v_head
  Open-Sora 2.0          python -m opensora_perflow.run ROOT/scripts/diffusion/train.py config.py
                         python -m opensora_perflow.run ROOT/scripts/diffusion/inference.py config.py --prompt "a red ball"
Without CUDA a training script that was not started by torchrun becomes a world of one process; inference stays plain, but for
that of Open-Sora 2.0, which waits for a process group.
"""


def build_parser() -> argparse.ArgumentParser:
    """Parser of the part of the command line that is ours: SCRIPT."""
    parser = argparse.ArgumentParser(
        prog="python -m opensora_perflow.run",
        usage="%(prog)s [-h] SCRIPT [args ...]",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", metavar="SCRIPT", help="a script inside an Open-Sora checkout")
    return parser


def find_host_root(script: str | Path) -> Path:
    """Folder of the checkout that `script` belongs to: the nearest parent from which `opensora` can be imported.

    Raises:
        ValueError: there is no such file, or no folder above it holds the package `opensora`.
    """
    path = Path(script).resolve()
    if not path.is_file():
        raise ValueError(
            f"SCRIPT must be the path of a Python file in an Open-Sora checkout, got {str(script)!r}, which is not a "
            f"file (looked in {path.parent}); pass for example ROOT/scripts/train.py"
        )
    for parent in path.parents:
        if (parent / "opensora" / "__init__.py").is_file():
            return parent
    raise ValueError(
        f"SCRIPT must lie in an Open-Sora checkout, got {str(path)!r}, and no folder above it holds the package "
        "'opensora'; clone hpcaitech/Open-Sora and pass one of its scripts/"
    )


@contextmanager
def _visible_lines() -> Iterator[None]:
    """Show what `portable` logs on stderr, from one process of a node.

    On that logger alone and only for as long as it takes: the host sets logging up with basicConfig (utils/misc.py
    v1.2.0:52), which does nothing once the root logger has a handler.
    """
    logger = logging.getLogger("opensora_perflow.portable")
    level, propagate = logger.level, logger.propagate
    handler = logging.StreamHandler() if os.environ.get("LOCAL_RANK", "0") == "0" else logging.NullHandler()
    handler.setFormatter(logging.Formatter("[opensora_perflow] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def register_with_host() -> None:
    """Enter the package's schedulers or models in the host's registries, and its checks before the host's models.

    `python -m` imports the package before the checkout is on sys.path, so that its own registration may have found no
    host to register with.
    """
    opensora_perflow.check_early()
    opensora_perflow.register_with_host()
    try:
        from opensora.registry import SCHEDULERS as host_schedulers
    except ImportError:
        return
    for name, scheduler in opensora_perflow.SCHEDULERS.module_dict.items():
        if name not in host_schedulers.module_dict:
            host_schedulers.register_module(name=name, module=scheduler)


def prepare(script: str) -> None:
    """Make this process one that can run `script`: its checkout on sys.path, the machine's gaps filled, perflow registered.

    Raises:
        ValueError: no such script, or it lies outside an Open-Sora checkout (see `find_host_root`).
    """
    root = find_host_root(script)
    # The script's own folder comes first, as Python puts it there for a script that is started directly.
    sys.path[:0] = [str(Path(script).resolve().parent), str(root)]
    with _visible_lines():
        portable.activate()
    register_with_host()


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run `script` in this process with `arguments` as its command line.

    Raises:
        ValueError: see `prepare`.
        SystemExit: whatever the script exits with.
    """
    prepare(script)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; exits with status 2 and a message where SCRIPT is missing or unusable."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    script = parser.parse_args(argv[:1]).script
    try:
        find_host_root(script)
    except ValueError as error:
        parser.error(str(error))
    run_script(script, argv[1:])


if __name__ == "__main__":
    main()
