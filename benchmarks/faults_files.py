"""What the package makes of damaged input: how often it fails without a name, and how often it goes on with wrong values.

    python benchmarks/faults_files.py [--count 3000] [--seed 0] [--json out.json]

files: weights of a small network, saved as safetensors, as torch files and in shards, are damaged and named as a teacher. A
minute for 3,000 on a CPU. An error is told where it is a ValueError or OSError that names the file, and raw otherwise.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opensora_perflow.training.state import find_state
from opensora_perflow.training.teacher import load_teacher

State = dict[str, Tensor]
DTYPES = (torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn)
FOREIGN = (
    b"",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n",
    b"<!DOCTYPE html><html><body>404</body></html>",
    b'{"error": "Repository not found"}',
    b'{"weight_map": {"weight": 3}}',
    b"[" * 50_000,
    b"\xff\xfe\x00\xd8\x00",
    b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }",
    b"cos\nsystem\n(S'true'\ntR.",
    b"\x10\x00\x00\x00\x00\x00\x00\x00" + b"[" * 16,
    b"\xff" * 64,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8))


# Forms: each writes a state dict into a folder and returns (what a user names, the files that can be damaged).


def _safetensors(folder: Path, state: State) -> tuple[Path, list[Path]]:
    path = folder / "model.safetensors"
    save_file(state, path, {"format": "pt"})
    return random.choice([path, folder]), [path]


def _torch_file(folder: Path, state: State) -> tuple[Path, list[Path]]:
    path = folder / random.choice(["model.pt", "model.pth", "pytorch_model.bin"])
    nest = random.choice([None, "ema", "state_dict", "model"])
    torch.save(state if nest is None else {"epoch": 3, nest: state}, path)
    return path, [path]


def _old_torch_file(folder: Path, state: State) -> tuple[Path, list[Path]]:
    path = folder / "model.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path, [path]


def _shards(folder: Path, state: State) -> tuple[Path, list[Path]]:
    kind, stem = random.choice([("safetensors", "model"), ("bin", "pytorch_model")])
    keys, names = list(state), [f"{stem}-{i:05d}-of-00002.{kind}" for i in (1, 2)]
    for name, part in zip(names, (keys[::2], keys[1::2])):
        tensors = {key: state[key] for key in part}
        save_file(tensors, folder / name) if kind == "safetensors" else torch.save(tensors, folder / name)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {key: names[i % 2] for i, key in enumerate(keys)}}))
    return folder, [index, index, *(folder / name for name in names)]


FORMS = (_safetensors, _safetensors, _torch_file, _old_torch_file, _shards, _shards)


# Damage to tensors, before they are written, and to bytes after that.


def _other_dtype(state: State) -> State:
    dtype = random.choice(DTYPES)
    return {key: value.to(dtype) for key, value in state.items() if dtype != torch.float8_e4m3fn or value.dim() > 0}


def _one_changed(state: State) -> State:
    key = random.choice(list(state))
    value = state.pop(key)
    changes: list[State] = [
        {},
        {f"{key}_": value},
        {key: value[:-1].clone()},
        {key: torch.full_like(value, random.choice([torch.nan, torch.inf]))},
        {key: value, "extra": torch.ones(2)},
        {key: value.to(torch.int8)},
    ]
    return {**state, **random.choice(changes)}


def _renamed(state: State) -> State:
    return {random.choice(["net.", "model.", "student."]) + key: value for key, value in state.items()}


def _truncated(content: bytearray) -> bytes:
    return content[: random.randrange(len(content))]


def _flipped(content: bytearray) -> bytes:
    for _ in range(random.choice([1, 1, 8])):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return content


def _zeroed(content: bytearray) -> bytes:
    start = random.randrange(len(content))
    length = random.randint(1, len(content) - start)
    content[start : start + length] = bytes(length)
    return content


def _inserted(content: bytearray) -> bytes:
    at = random.randrange(len(content))
    return content[:at] + random.randbytes(random.randint(1, 64)) + content[at:]


def _foreign(content: bytearray) -> bytes:
    return random.choice([*FOREIGN, random.randbytes(200)])


def _misled(content: bytearray) -> bytes:
    """An index that names other files; other files become random bytes."""
    if not content.startswith(b'{"metadata"'):
        return random.randbytes(len(content))
    index = json.loads(content)
    key = random.choice(list(index["weight_map"]))
    names = [
        "../outside.safetensors",
        "/etc/hostname",
        "missing.safetensors",
        "missing.bin",
        "",
        "\0",
        3,
        None,
        [],
        "config.json",
    ]
    index["weight_map"][key] = random.choice(names)
    return json.dumps(index).encode()


OF_TENSORS: tuple[Callable[[State], State], ...] = (_other_dtype, _one_changed, _renamed)
OF_BYTES: tuple[Callable[[bytearray], bytes], ...] = (_truncated, _flipped, _flipped, _zeroed, _inserted, _foreign, _misled)


def damaged_files(count: int, seed: int) -> Counter[str]:
    """How many of `count` damaged checkpoints met which end.

    told: refused by name. harmless: taken, and the values are those that were saved. raw: an error of another kind, or without
    the file's name. silent: taken with other values. unseen: as silent, but only values differ, in a format that has no
    checksum (safetensors, torch's old one), where nobody can tell. Keys that begin with a space count raw errors by type.
    """
    random.seed(seed)
    ends: Counter[str] = Counter()
    original = network()
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            folder = Path(place) / f"run{number}"
            folder.mkdir()
            save_file(original.state_dict(), folder.parent / "outside.safetensors")
            ends.update(_end(folder, original))
            shutil.rmtree(folder)
    return ends


def _end(folder: Path, original: nn.Module) -> list[str]:
    state, form = {key: value.clone() for key, value in original.state_dict().items()}, random.choice(FORMS)
    of_tensors = random.random() < 0.25
    source, files = form(folder, random.choice(OF_TENSORS)(state) if of_tensors else state)
    damaged = random.choice(files)
    if not of_tensors:
        damaged.write_bytes(random.choice(OF_BYTES)(bytearray(damaged.read_bytes())))
    student = network()
    with torch.no_grad():  # so that what was not loaded shows
        for parameter in student.parameters():
            parameter.zero_()
    try:
        find_state(source)
        loaded = load_teacher(student, source).state_dict()
    except (ValueError, OSError) as error:
        named = any(str(path) in str(error) for path in (source, *files))
        return ["told"] if named else ["raw", f" {type(error).__name__} without a name"]
    except Exception as error:
        return ["raw", f" {type(error).__name__}"]
    if all(torch.equal(loaded[key], value) for key, value in original.state_dict().items()):
        return ["harmless"]
    has_checksum = damaged.suffix != ".safetensors" and form is not _old_torch_file
    return ["silent", f" {form.__name__}"] if has_checksum or of_tensors else ["unseen"]


WHAT = {"files": damaged_files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=WHAT, default="files", help="which faults; default files")
    parser.add_argument("--count", type=int, default=3000, help="how many; default 3000")
    parser.add_argument("--seed", type=int, default=0, help="of the damage; default 0")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    args = parser.parse_args()
    logging.getLogger("opensora_perflow").setLevel(logging.ERROR)
    ends = WHAT[args.what](args.count, args.seed)
    for end, number in ends.items():
        print(f"{number:6d} {end}")
    if args.json:
        args.json.write_text(json.dumps(ends, indent=1) + "\n")


if __name__ == "__main__":
    main()
