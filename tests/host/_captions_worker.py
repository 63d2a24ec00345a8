"""Builds the training set `perflow_captions` of one checkout for many tables and settings; see test_captions_dataset.py.

    python _captions_worker.py ROOT CASES.json OUT.json

CASES is a list of keyword arguments. OUT lists, for each, the captions and the sizes of the first sample, or the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def build(arguments: dict[str, Any]) -> dict[str, Any]:
    from opensora.registry import DATASETS, build_module

    arguments = {key: float(value) if value in ("nan", "inf") else value for key, value in arguments.items()}
    try:
        found = build_module(dict(type="perflow_captions", **arguments), DATASETS)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    first = found[f"0-{'-'.join(str(size) for size in found.get_data_info(0))}"]
    shape = list(first["video"].shape)
    return {"captions": [found[f"{row}-2-16-16"]["text"] for row in range(len(found))], "shape": shape, "fps": first["fps"]}


def main(root: str, cases: str, out: str) -> None:
    sys.path.insert(0, root)
    from opensora_perflow import portable

    portable.activate()
    import opensora_perflow.hosts.captions  # noqa: F401  registers the training set

    Path(out).write_text(json.dumps([build(case) for case in json.loads(Path(cases).read_text())]))


if __name__ == "__main__":
    main(*sys.argv[1:])
