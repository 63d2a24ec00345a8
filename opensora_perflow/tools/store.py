"""`opensora-perflow encode` and `store`: what of a training can be done once, and kept on disk."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from opensora_perflow.checks import check_num_steps

_EXAMPLE = """
examples (in the folder that the training will be started from):
  opensora-perflow encode CONFIG --data-path captions.csv --out text --open-sora ../Open-Sora
  opensora-perflow store CONFIG --data-path captions.csv --out store --chains 20000 --open-sora ../Open-Sora
  torchrun --nproc_per_node 8 -m opensora_perflow store CONFIG --data-path captions.csv --out store
  opensora-perflow store CONFIG --data-path captions.csv --out store --grow 5000 --open-sora ../Open-Sora
Both go on where they were stopped or killed: the same command again does what is missing. More captions for `encode`, a larger
--chains or --grow for `store`, are added to what is there.
"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `encode` and `store` to the command line."""
    encode_parser = commands.add_parser(
        "encode",
        help="encode captions once, so that training holds no T5 (Open-Sora 1.2, 1.3, 2.0)",
        description=(
            "Encodes the captions of a training config's data set with the config's text encoder, and writes the embeddings\n"
            "as safetensors. The training then takes them from there, and no T5 is loaded:\n"
            '    custom_imports = dict(imports=[..., "opensora_perflow.hosts.stored"], allow_failed_imports=False)\n'
            '    text_encoder = dict(_delete_=True, type="perflow_encoded", folder="OUT")\n'
            "In Open-Sora 2.0 there are two, and nothing more to import:\n"
            '    t5 = dict(_delete_=True, type="perflow_encoded_t5", folder="OUT")\n'
            '    clip = dict(_delete_=True, type="perflow_encoded_clip", folder="OUT")\n'
            "Sampling with such a config takes prompts that are among the captions. An embedding takes 8 kB a token: of 2.0,\n"
            "whose networks attend to padding, 4 MiB a caption."
        ),
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    store_parser = commands.add_parser(
        "store",
        help="solve the teacher's paths once, so that training holds no teacher (Open-Sora 1.2, 1.3, 2.0)",
        description=(
            "Draws noise and a caption for each chain, and lets the guided teacher of a training config carry the noise\n"
            "through all windows. The states at the windows' clean edges are written as float16 safetensors, and the\n"
            "captions' embeddings beside them in OUT/text. Of the data set only captions and sizes are used; chains are\n"
            'spread over bucket_config as videos are. With draws=dict(starts="diffused") in the config, videos are read and\n'
            "encoded too, and each window starts at one with noise. The training then needs no teacher, no T5 and no VAE:\n"
            '    scheduler = dict(teacher=dict(stored="OUT"), ...)    # 2.0: model = dict(perflow=dict(...))\n'
            "A chain of 4 windows takes .26 MiB at 144p x 51 frames, 3.3 MiB at 360p x 102, 4.1 MiB at 256px x 129 (2.0).\n"
            'Guidance must be folded in (mode="fixed" or "range"). Open-Sora 2.0\'s table has the columns text, num_frames,\n'
            "height, width and fps. Its chains are text to video."
        ),
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    count = store_parser.add_mutually_exclusive_group()
    count.add_argument("--chains", type=int, help="chains that OUT is to have at least (default: one a row of the table)")
    count.add_argument(
        "--grow", type=int, metavar="N", help="add N chains at least to those in OUT; a training takes them at its next pass"
    )
    store_parser.add_argument(
        "--first-window",
        type=int,
        default=0,
        metavar="N",
        help="solve the first window of each chain from N further noises (default 0); draw it as often by draws.shares",
    )
    for parser, what in ((encode_parser, "text encoder encodes"), (store_parser, "teacher solves")):
        parser.add_argument("config", type=Path, metavar="CONFIG", help=f"config of the training, whose {what}")
        parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder to write, or to go on with")
        parser.add_argument("--data-path", type=Path, metavar="TABLE", help="table of captions (default: the config's)")
        parser.add_argument("--open-sora", type=Path, metavar="ROOT", help="Open-Sora checkout (default: the installed one)")


def encode(args: dict[str, Any]) -> int:
    """Run `encode` with parsed arguments; returns the exit status."""
    storing, is_v2 = _storing(args)
    storing.encode(progress=_bar, **args)
    sections = {"t5": "perflow_encoded_t5", "clip": "perflow_encoded_clip"} if is_v2 else {"text_encoder": "perflow_encoded"}
    if _is_first():
        lines = [f'{name} = dict(_delete_=True, type="{kind}", folder="{args["out"]}")' for name, kind in sections.items()]
        print(f"written to {args['out']}: {'; '.join(lines)}")
    return 0


def store(args: dict[str, Any]) -> int:
    """Run `store` with parsed arguments; returns the exit status.

    Raises:
        ValueError: --chains or --grow below 1, or --first-window below 0.
    """
    for name in ("chains", "grow"):
        if args[name] is not None:
            check_num_steps(args[name], f"--{name}")
    if args["first_window"] < 0:
        raise ValueError(f"--first-window must be an integer >= 0, got {args['first_window']}")
    from opensora_perflow.hosts.storing import store as store_chains

    host, is_v2 = _storing(args)
    count = store_chains(host, progress=_bar, **args)
    if _is_first():
        key = f'dict(teacher=dict(stored="{args["out"]}"), ...)'
        print(f"{count} chains are in {args['out']}: {f'model = dict(perflow={key})' if is_v2 else f'scheduler = {key}'}")
    return 0


def _storing(args: dict[str, Any]) -> tuple[ModuleType, bool]:
    """The host's module that encodes and stores; is it Open-Sora 2.0's? `open_sora` is taken out.

    Raises:
        ValueError: --out is a file; see storing.use_host.
    """
    if args["out"].exists() and not args["out"].is_dir():
        raise ValueError(f"--out must be a folder, got the file {str(args['out'])!r}; name another")
    from opensora_perflow.hosts.storing import use_host

    is_v2 = use_host(args["config"], args.pop("open_sora"))
    if is_v2:
        from opensora_perflow.hosts.v2 import storing
    else:
        from opensora_perflow.hosts.v1 import storing
    return storing, is_v2


def _bar(total: int, what: str) -> Any:
    return tqdm(total=total, desc=what, unit=f" {what}", disable=not _is_first()).update


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
