"""The real STDiT3 of Open-Sora v1.2.0 on a GPU: equal numbers on both devices, and what sampling and training cost.

    python benchmarks/gpu.py --open-sora ../Open-Sora [--part parity sample train t5] [--size full|tiny] [--out FOLDER]

Weights are random: time and memory do not depend on them. Needs a GPU of 80 GB for minutes, and the host's Python packages;
`--size tiny` runs the same code with a small network, in half a minute on a CPU. Prints rows, and writes gpu.json and gpu.md.

parity  A small float32 network, largest absolute and relative differences: perflow's samples against those of the host's rflow,
        and the device's samples, losses and gradients against the CPU's, from given noise and times (generators differ).
sample  Denoising latents in bfloat16: the host's rflow with 30 guided steps, perflow with 4 steps of a student with folded
        guidance. Evaluations = of the network, for one sample; outside = share of the time that the network does not take.
train   A training step (loss, gradient, optimizer, EMA) with gradient checkpointing. Weights are bfloat16; beside them stand
        float32 masters, Adam's moments and the EMA, as the host's ZeRO has them in one process.
t5      Encoding one prompt of 300 tokens by an encoder of T5-XXL's size, in float32 (with TF32; v1.2.0's default) and bfloat16.

Seconds: median of 3 repeats after a warm-up; spread: slowest - fastest. GiB of torch's tensors: resident before, peak during.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Row, Size, Video = dict[str, Any], SimpleNamespace, tuple[int, int, int]  # a video: height, width, number of frames
REPEATS = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THERE = dict(device=DEVICE, dtype=torch.bfloat16)
FOLDED, EULER = dict(mode="fixed", scale=7.0), dict(steps_per_window=8, solver="euler")
DIFFUSED = dict(starts="diffused", edge_mass=0, per_solve=1)
RECIPES: dict[str, Row | None] = {
    "host's rflow": None,
    "reference PeRFlow": dict(windows=4, guidance=FOLDED, teacher=EULER, draws=DIFFUSED),
    "defaults, mode sync": dict(windows=4),
    "defaults, mode fixed": dict(windows=4, guidance=FOLDED),
    "mode fixed, per_solve=1": dict(windows=4, guidance=FOLDED, draws=dict(per_solve=1)),
    "mode fixed, adapters of rank 16": dict(windows=4, guidance=FOLDED, rank=16),
}
V64, V144, V360 = (64, 64, 17), (144, 256, 51), (360, 640, 51)
SMALL = dict(hidden_size=96, depth=2, num_heads=4, caption_channels=32, model_max_length=10)
XL = dict(hidden_size=1152, depth=28, num_heads=16, caption_channels=4096, model_max_length=300)
T5_SMALL = dict(d_model=64, d_ff=128, num_heads=4, d_kv=16, num_layers=2)
T5_XXL = dict(d_model=4096, d_ff=10240, num_heads=64, d_kv=64, num_layers=24)
SIZES = {  # videos are sampled, batches (video, number of samples) are trained on
    "full": Size(network=XL, t5=T5_XXL, host_steps=30, videos=[V144, V360], batches=[(V144, 1), (V144, 4), (V360, 1)]),
    "tiny": Size(network=SMALL, t5=T5_SMALL, host_steps=6, videos=[V64], batches=[(V64, 2)]),
}


def use_torch_for_flash_attn() -> None:
    """Offer torch's attention under the name of flash_attn's."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=softmax_scale).transpose(1, 2)

    sys.modules["flash_attn"] = SimpleNamespace(flash_attn_func=flash_attn_func, __spec__=ModuleSpec("flash_attn", None))
    print("flash_attn is not installed: torch's scaled_dot_product_attention takes its place", flush=True)


def build_network(config: dict[str, int], device: str, dtype: torch.dtype, **settings: Any) -> nn.Module:
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    torch.manual_seed(0)
    with torch.device(device):
        network = STDiT3(STDiT3Config(patch_size=(1, 2, 2), in_channels=4, qk_norm=True, **config, **settings))
        for block in network.temporal_blocks:  # they begin at zero, where nothing would depend on them
            for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                nn.init.normal_(layer.weight, std=0.02)
    return network.to(device, dtype)


def build_scheduler(name: str, **config: Any) -> Any:
    from opensora_perflow import SCHEDULERS, build_module

    return build_module(dict(type=name, use_timestep_transform=True, **config), SCHEDULERS)


def inputs(video: Video, config: dict[str, int], batch_size: int, **to: Any) -> tuple[Tensor, Row]:
    """Noise in the shape of v1.2's latents, and (text, what the host tells a network about the video)."""
    (height, width, num_frames), draw = video, torch.Generator().manual_seed(1)
    z = torch.randn(batch_size, 4, num_frames // 17 * 5, height // 8, width // 8, generator=draw).to(**to)
    y = torch.randn(batch_size, 1, config["model_max_length"], config["caption_channels"], generator=draw).to(**to)
    mask = torch.ones(batch_size, config["model_max_length"], dtype=torch.long, device=z.device)
    values = dict(height=height, width=width, num_frames=num_frames, ar=height / width, fps=24)
    return z, dict(y=y, mask=mask, **{name: torch.full((batch_size,), float(value), **to) for name, value in values.items()})


@torch.no_grad()
def run_sampler(scheduler: Any, network: nn.Module, z: Tensor, condition: Row) -> Tensor:
    """Samples, with a text encoder that has done its work before."""
    text = {name: condition[name] for name in ("y", "mask")}
    encoder = SimpleNamespace(encode=lambda prompts: dict(text), null=lambda n: torch.zeros_like(text["y"]))
    sizes = {name: value for name, value in condition.items() if name not in text}
    return scheduler.sample(network, encoder, z, ["a"] * len(z), z.device.type, additional_args=sizes, progress=False)


def timed(call: Callable[[], Any], repeats: int = REPEATS) -> Row:
    """Seconds of a call that has been warmed up; on a GPU also memory before it, and its peak."""
    seconds, on_gpu = [], DEVICE == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    resident = torch.cuda.memory_allocated() / 2**30
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    wait()
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    row = {"seconds": statistics.median(seconds), "spread": max(seconds) - min(seconds)}
    return row | ({"resident GiB": resident, "peak GiB": torch.cuda.max_memory_allocated() / 2**30} if on_gpu else {})


def parity_outputs(device: str) -> dict[str, Tensor]:
    """Samples of both schedulers, losses and gradients, brought to the CPU."""
    found = {}
    network = build_network(SMALL, "cpu", torch.float32, class_dropout_prob=0.0).to(device)  # text dropout would be drawn
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    z, condition = inputs(V64, SMALL, 2, device=device, dtype=torch.float32)
    for name in ("rflow", "perflow"):
        scheduler = build_scheduler(name, num_sampling_steps=8, cfg_scale=7.0)
        found[f"{name}, samples"] = run_sampler(scheduler, network.eval(), z, condition)
    times, draws = torch.tensor([900.0, 400.0], device=device), dict(starts="diffused", edge_mass=1.0)
    for mode, guidance in (("sync", dict(mode="sync")), ("fixed", FOLDED)):
        scheduler = build_scheduler("perflow", watch=None, draws=draws, guidance=guidance)
        loss = scheduler.training_losses(network.train(), z.flip(0), condition, noise=z, t=times)["loss"]
        gradient = [part.flatten() for part in torch.autograd.grad(loss.sum(), parameters)]
        found |= {f"mode {mode}, loss": loss.detach(), f"mode {mode}, gradient": torch.cat(gradient)}
    return {name: value.cpu() for name, value in found.items()}


def parity(size: Size) -> Iterator[Row]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    here, there = parity_outputs("cpu"), parity_outputs(DEVICE)
    pairs = {f"perflow and rflow on {DEVICE}, samples": (there["perflow, samples"], there["rflow, samples"])}
    pairs |= {f"{DEVICE} and cpu, {name}": (there[name], here[name]) for name in here}
    for name, (a, b) in pairs.items():
        yield {"compared": name, "largest": (a - b).abs().max().item(), "relative": ((a - b).norm() / b.norm()).item()}


@torch.no_grad()
def sample(size: Size) -> Iterator[Row]:
    network = build_network(size.network, **THERE, enable_flash_attn=True).eval()
    host = build_scheduler("rflow", num_sampling_steps=size.host_steps, cfg_scale=7.0)
    ours = build_scheduler("perflow", num_sampling_steps=4, guidance=FOLDED)
    samplers = {f"host's rflow, {size.host_steps} guided steps": host, "perflow, 4 folded steps": ours}
    seen: list[int] = []
    network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for video, (name, scheduler) in itertools.product(size.videos, samplers.items()):
        call = partial(run_sampler, scheduler, network, *inputs(video, size.network, 1, **THERE))
        seen.clear()
        call()
        evaluations, calls = sum(seen), len(seen)
        cost = timed(call)
        z, condition = inputs(video, size.network, evaluations // calls, **THERE)
        alone = timed(partial(network, z, torch.full((len(z),), 500.0, device=DEVICE), **condition))
        outside = 1 - calls * alone["seconds"] / cost["seconds"]
        yield {"video": f"{video[0]}p x {video[2]}", "sampler": name, "evaluations": evaluations, **cost, "outside": outside}


class Optimizer:
    """As the host's ZeRO and EMA in one process: float32 masters with Adam's moments, and their float32 average if wanted."""

    def __init__(self, network: nn.Module, averages: bool = True) -> None:
        self.working = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.masters = [parameter.detach().float().clone() for parameter in self.working]
        self.average = [master.clone() for master in self.masters] if averages else []
        # Fused where it can be, as the host's HybridAdam is: no temporaries of the weights' size.
        self.adam = torch.optim.AdamW(self.masters, lr=1e-5, weight_decay=0, fused=DEVICE == "cuda")

    @torch.no_grad()
    def step(self) -> None:
        for master, parameter in zip(self.masters, self.working):
            master.grad, parameter.grad = parameter.grad.float(), None
        self.adam.step()
        self.adam.zero_grad()
        for master, parameter in zip(self.masters, self.working):
            parameter.copy_(master)
        for master, average in zip(self.masters, self.average):
            average.lerp_(master, 1e-4)


def train(size: Size) -> Iterator[Row]:
    for (video, batch_size), (name, recipe) in itertools.product(size.batches, RECIPES.items()):
        row = {"video": f"{video[0]}p x {video[2]}", "batch": batch_size, "recipe": name}
        try:
            yield {**row, **training_costs(recipe, size.network, *inputs(video, size.network, batch_size, **THERE))}
        except torch.cuda.OutOfMemoryError:
            yield {**row, "seconds": "out of memory"}


def training_costs(recipe: Row | None, config: dict[str, int], data: Tensor, condition: Row) -> Row:
    """Time and memory of a training step; recipe None: the host's rflow."""
    from opensora.acceleration.checkpoint import set_grad_checkpoint

    gc.collect()  # nothing of one measurement is in the next
    network = build_network(config, **THERE, enable_flash_attn=True, freeze_y_embedder=True).train()  # as the host's configs
    recipe = None if recipe is None else dict(recipe)
    rank = None if recipe is None else recipe.pop("rank", None)
    if rank is not None:
        from opensora_perflow.hosts.v1.lora import LoRA, add_adapters

        add_adapters(network, LoRA(rank))
    set_grad_checkpoint(network)
    optimizer = Optimizer(network)
    scheduler = build_scheduler("rflow") if recipe is None else build_scheduler("perflow", watch=None, **recipe)

    def step() -> None:
        scheduler.training_losses(network, data, dict(condition))["loss"].mean().backward()
        optimizer.step()

    step()
    return timed(step)


@torch.no_grad()
def t5(size: Size) -> Iterator[Row]:
    from transformers import T5Config, T5EncoderModel

    for dtype in (torch.float32, torch.bfloat16):
        with torch.device(DEVICE):
            encoder = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **size.t5)).to(dtype).eval()
            tokens = torch.ones(1, 300, dtype=torch.long)
        encode = partial(encoder, input_ids=tokens, attention_mask=tokens)
        encode()
        yield {"precision": str(dtype).removeprefix("torch."), **timed(encode)}


PARTS: dict[str, Callable[[Size], Iterator[Row]]] = {"parity": parity, "sample": sample, "train": train, "t5": t5}


def formatted(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(record: Row, folder: Path) -> None:
    """gpu.json, and gpu.md with one table a part."""
    from opensora_perflow.atomic import replacing

    lines = [f"{record['card']}, torch {record['torch']}, `{record['command']}`"]
    for part, rows in record["parts"].items():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [columns, ["---"] * len(columns), *([formatted(row.get(name, "")) for name in columns] for row in rows)]
        lines += ["", f"{part}:", "", *(f"| {' | '.join(line)} |" for line in cells)]
    for name, text in (("gpu.json", json.dumps(record, indent=1)), ("gpu.md", "\n".join(lines) + "\n")):
        with replacing(folder / name) as path:
            path.write_text(text)


def measure(part: str, rows_of: Callable[[], Iterator[Row]], record: Row, out: Path) -> bool:
    """Run one part; print and write each row. False: it failed, which should not keep a rented GPU from the other parts."""
    began, rows = time.perf_counter(), record["parts"].setdefault(part, [])
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as the host's scripts do
    try:
        for row in rows_of():
            rows.append(row)
            print(f"{part}: {', '.join(f'{name} {formatted(value)}' for name, value in row.items())}", flush=True)
            write(record, out)
    except Exception:
        traceback.print_exc()
        return False
    print(f"{part} took {time.perf_counter() - began:.0f} s", flush=True)
    return True


def command_line(doc: str, parts: Collection[str], tag: str) -> argparse.Namespace:
    """Of a benchmark on a GPU.

    Args:
        doc: Its docstring. parts: What it can measure. tag: Open-Sora's, whose checkout it needs.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-sora", type=Path, required=True, help=f"root of an Open-Sora {tag} checkout")
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts), help="what is measured (default: all parts)")
    sizes = "full: the real network (default); tiny: a small one"
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help=sizes)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for gpu.json and gpu.md (default gpu)")
    args = parser.parse_args()
    if args.size == "full" and DEVICE == "cpu":
        parser.error("--size full needs a GPU and torch finds none; --size tiny runs on a CPU")
    return args


def run_parts(parts: Mapping[str, Callable[[], Iterator[Row]]], out: Path) -> int:
    """Measure each; the number of those that failed."""
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    record = dict(card=card, torch=torch.__version__, command=shlex.join(["python", *sys.argv]), repeats=REPEATS, parts={})
    return sum(not measure(part, rows_of, record, out) for part, rows_of in parts.items())


def main() -> int:
    args = command_line(__doc__, PARTS, "v1.2.0")
    sys.path.insert(0, str(args.open_sora.resolve()))

    from opensora_perflow import portable

    portable.activate()
    import opensora.schedulers.rf  # noqa: F401  registers rflow

    if find_spec("flash_attn") is None:
        use_torch_for_flash_attn()
    return run_parts({part: partial(PARTS[part], SIZES[args.size]) for part in args.part}, args.out)


if __name__ == "__main__":
    sys.exit(main())
