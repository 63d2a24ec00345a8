"""Bytes that a training keeps for networks and optimizer: three copies of the network, two, or one with adapters (LoRA).

    python benchmarks/memory.py [--open-sora ROOT] [--rank 16] [--json out.json]

Measured, in float32 on a CPU, in one process: the storages of student, teacher, EMA, Adam's states and gradients after a step,
each counted once, and the tensors that autograd keeps for the step's backward. Networks: the demo's, and with --open-sora
(a checkout of v1.2.0 or v1.3; OPENSORA_ROOTS names one too) the real STDiT3 with a hidden size of 384.
Counted, for STDiT3-XL/2 on 1 and 8 GPUs with ZeRO-2 in bf16: weights of every copy, and shards of gradients in bf16, of float32
master weights, of Adam's states and of the host's float32 EMA. No activations, buckets, text encoder and VAE.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from few_step import set_up_process
from recipes import OURS, REFERENCE
from torch import Tensor, nn

from opensora_perflow import SCHEDULERS, build_module, portable
from opensora_perflow.hosts import meta
from opensora_perflow.hosts.chains import CHAIN
from opensora_perflow.hosts.v1.chain_solver import chain_solver
from opensora_perflow.hosts.v1.lora import LoRA, add_adapters
from opensora_perflow.hosts.v1.stored_chains import chain_bytes
from opensora_perflow.tools.residents import residents
from opensora_perflow.training.store import ChainWriter, chain_noise
from opensora_perflow.worlds.model import load_teacher

MIB, GIB = 2**20, 2**30
BATCH, FRAMES, SIDE = 2, 5, 16


def bytes_of(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Of the storages that are not in `seen` yet."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen and storage.nbytes():
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def store(network: nn.Module, told: dict[str, Tensor], settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Write a store of one batch's chains; the settings that train from it."""
    solver = chain_solver(build_module(settings, SCHEDULERS), network, None, 0, torch.float32)
    noise = torch.stack([chain_noise(0, chain, (4, FRAMES, SIDE, SIDE)) for chain in range(BATCH)])
    ChainWriter(folder, solver.origin).write(0, 0, solver.ends(noise, told, 0)[0], [""] * BATCH, {})
    told[CHAIN] = torch.stack([chain_bytes(chain) for chain in range(BATCH)])
    return {**settings, "teacher": dict(stored=folder)}


def measure(network: nn.Module, lora: LoRA | None, settings: dict[str, Any], folder: str | None = None) -> dict[str, int]:
    """Bytes of each resident after one step, of all together, and of what the step's backward needs besides.

    folder: Of a store that is written and trained from; None: the teacher solves.
    """
    network.train()
    if lora is not None:
        add_adapters(network, lora)
    ema = deepcopy(network).to(torch.float32).requires_grad_(False)  # as train.py does
    config = dict(type="perflow", watch=None, guidance=dict(mode="fixed", scale=3.0), **settings)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    length, channels = network.y_embedder.y_embedding.shape
    sizes = {"height": 8.0 * SIDE, "width": 8.0 * SIDE, "num_frames": 17.0, "fps": 24.0, "ar": 1.0}
    told = {name: torch.full((BATCH,), value) for name, value in sizes.items()}
    told |= {"y": torch.randn(BATCH, 1, length, channels), "mask": torch.ones(BATCH, length, dtype=torch.long)}
    scheduler = build_module(config if folder is None else store(network, told, config, folder), SCHEDULERS)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = scheduler.training_losses(network, torch.randn(BATCH, 4, FRAMES, SIDE, SIDE), told)["loss"].mean()
    loss.backward()
    optimizer.step()
    seen: set[int] = set()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    parts = {
        "student": meta.tensors_of(network),
        "teacher": meta.tensors_of(scheduler.run.teacher.network),
        "EMA": meta.tensors_of(ema),
        "Adam": states,
        "gradients": [parameter.grad for parameter in trained if parameter.grad is not None],
    }
    row = {name: bytes_of(tensors, seen) for name, tensors in parts.items()}
    row["resident"] = sum(row.values())
    row["saved"] = bytes_of(kept, seen)
    return row


def stdit3(root: Path, hidden: int = 384, **sizes: Any) -> nn.Module:
    """The real class, in float32 with random weights."""
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
        portable.activate()
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    shape = {"depth": 2, "num_heads": 6, "caption_channels": 64, "model_max_length": 20, "in_channels": 4, **sizes}
    return STDiT3(STDiT3Config(hidden_size=hidden, qk_norm=True, **shape))


def counted(root: Path, rank: int) -> list[dict[str, float]]:
    """Bytes a GPU for STDiT3-XL/2: {"gpus", "three copies", "adapters"}."""
    sizes = {"depth": 28, "num_heads": 16, "caption_channels": 4096, "model_max_length": 300}
    networks = []
    for lora in (None, LoRA(rank)):
        with meta.unloaded():
            network = stdit3(root, 1152, freeze_y_embedder=True, **sizes)
            networks.append((network if lora is None else add_adapters(network, lora)).to(torch.bfloat16))
    return [
        {"gpus": gpus}
        | {
            name: sum(residents(network, gpus, copied_teacher=not adapted, adapters=adapted).values())
            for network, (name, adapted) in zip(networks, {"three copies": False, "adapters": True}.items())
        }
        for gpus in (1, 8)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = next((part for part in os.environ.get("OPENSORA_ROOTS", "").split(":") if part), None)
    parser.add_argument(
        "--open-sora", type=Path, default=named, help="root of a checkout (default: the first of OPENSORA_ROOTS)"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    set_up_process()
    logging.getLogger("opensora_perflow").setLevel(logging.ERROR)  # latents are random here, and the teacher does not fit them
    networks: dict[str, Callable[[], nn.Module]] = {"demo's model": load_teacher}
    if args.open_sora is not None:
        root = Path(args.open_sora).resolve()
        networks["STDiT3, hidden 384"] = lambda: stdit3(root)
    trainings = {
        "three copies, reference recipe": (None, REFERENCE),
        "three copies, ours": (None, OURS),
        "two copies, stored chains": (None, OURS),
        "adapters, one copy": (LoRA(args.rank), OURS),
    }
    rows: list[dict[str, Any]] = []
    names = ("student", "teacher", "EMA", "Adam", "gradients", "resident", "saved")
    print(f"| network | training | {' | '.join(names)} | resident, of the reference | resident + saved |\n|{'---|' * 11}")
    for network, make in networks.items():
        first = None
        for training, (lora, settings) in trainings.items():
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory() as folder:
                row = measure(make(), lora, settings, folder if "stored" in training else None)
            first = first or row
            share, peak = (row["resident"] / first["resident"], row["resident"] + row["saved"])
            shown = " | ".join(f"{row[name] / MIB:.2f}" for name in names)
            print(f"| {network} | {training} | {shown} | {share:.3f} | {peak / MIB:.1f} |", flush=True)
            rows.append({"network": network, "training": training, **row, "share": share})
    for row in counted(root, args.rank) if args.open_sora is not None else []:
        share = row["adapters"] / row["three copies"]
        copies, one = row["three copies"] / GIB, row["adapters"] / GIB
        print(f"{row['gpus']} GPU: three copies {copies:.2f} GiB, adapters {one:.2f} GiB, {share:.3f} of them")
        rows.append({"network": "STDiT3-XL/2, counted", **row, "share": share})
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
