"""The real MMDiT of Open-Sora 2.0 (11.9 B parameters) on a GPU: what sampling, and a training step with adapters, cost.

    python benchmarks/gpu_v2.py --open-sora ../Open-Sora [--part sample train] [--size full|tiny] [--out FOLDER]

Weights are random: time and memory do not depend on them. Needs a GPU of 80 GB for five minutes, and the host's Python
packages; `--size tiny` runs the same code with a small network, in half a minute on a CPU. Prints rows, and writes gpu.json
and gpu.md.

sample  Denoising latents in bfloat16 by the host's I2VDenoiser: the host's guided steps, and 4 steps of a student with folded
        guidance. Rows = what the network evaluates for one video. Where fewer than the host's 50 steps are timed, `of 50` is
        the seconds of a step times 50.
train   A step of configs/opensora/v2/train/perflow_256px_lora.py: one copy of the network, gradient checkpointing as there,
        float32 masters and Adam's moments of the adapters. Four steps, since the windows that are drawn differ in cost.

Seconds: median after a warm-up; spread: slowest - fastest. GiB of torch's tensors: resident before, peak during.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu import DEVICE, Optimizer, Row, Size, command_line, run_parts, timed
from mmengine.config import Config

from opensora_perflow.tools.open_sora_2 import NETWORK, Scripts

CONFIG = Path(__file__).parents[1] / "configs" / "opensora" / "v2" / "train" / "perflow_256px_lora.py"
OTHERS = ("type", "perflow", "from_pretrained", "strict_load")
HOST_STEPS, GUIDANCE, PROMPT = 50, 7.5, ["a red ball moving right"]
FOLDED = dict(windows=4, guidance=dict(mode="fixed", scale=[6.98, 4.38, 4.12, 4.12]))
V256, V768 = (192, 336, 129), (576, 1024, 129)


def sizes() -> dict[str, SimpleNamespace]:
    """Videos are height, width, number of frames; sampled ones with the steps of the host's that are timed."""
    full = {name: value for name, value in Config.fromfile(CONFIG).model.items() if name not in OTHERS}
    tiny = {**NETWORK, "in_channels": 64, "grad_ckpt_settings": (1, 1)}
    return {
        "full": Size(network=full, text_length=512, sampled={V256: HOST_STEPS, V768: 1}, trained=V256),
        "tiny": Size(network=tiny, text_length=10, sampled={(64, 64, 5): 2}, trained=(64, 64, 5)),
    }


def latents(video: tuple[int, int, int]) -> torch.Tensor:
    """Noise in the shape of the host's latents, [1, C, T, H, W]."""
    (height, width, num_frames), draw = video, torch.Generator().manual_seed(1)
    noise = torch.randn(1, 16, (num_frames - 1) // 4 + 1, height // 8, width // 8, generator=draw)
    return noise.to(DEVICE, torch.bfloat16)


def words(video: tuple[int, int, int]) -> str:
    height, width, num_frames = video
    return f"{height} x {width} x {num_frames}"


def sample(host: Scripts, size: SimpleNamespace) -> Iterator[Row]:
    """The student is the host's network with hooks, so that one network does for both."""
    network, rows = host.network(None).eval(), []
    network.register_forward_pre_hook(lambda module, args, named: rows.append(len(named["img"])), with_kwargs=True)
    yield {"video": "", "sampler": f"parameters: {sum(parameter.numel() for parameter in network.parameters())}"}

    def cost(video: tuple[int, int, int], sampler: str, steps: int, repeats: int) -> Row:
        call = partial(host.sample, network, latents(video), PROMPT, guidance=GUIDANCE)
        if repeats > 1 or steps > 1:
            call(steps=1)
        rows.clear()
        cost = timed(partial(call, steps=steps), repeats)
        return {"video": words(video), "sampler": sampler, "steps": steps, "rows": sum(rows) // repeats, **cost}

    for video, steps in size.sampled.items():
        row = cost(video, "host's, guided", steps, 1)
        yield {**row, f"of {HOST_STEPS}": row["seconds"] * HOST_STEPS / steps}
    from opensora_perflow.hosts.v2.denoiser import step_students
    from opensora_perflow.hosts.v2.flux import PeRFlowFlux

    hooks = PeRFlowFlux(FOLDED)
    step_students(hooks)
    hooks.attach(network)
    network._forward_pre_hooks.move_to_end(next(iter(network._forward_pre_hooks)))  # rows are counted last
    for video, steps in size.sampled.items():
        yield cost(video, "perflow, folded", 4, 3 if steps > 1 else 1)


def train(host: Scripts, size: SimpleNamespace) -> Iterator[Row]:
    from opensora.acceleration.checkpoint import set_grad_checkpoint
    from peft import LoraConfig, get_peft_model

    config = Config.fromfile(CONFIG)
    # As booster.enable_lora does it; the precision of adapters is the network's, as ZeRO has them.
    network = host.network(None, config.model.perflow.to_dict())
    model = get_peft_model(network, LoraConfig(**config.lora_config.to_dict()), autocast_adapter_dtype=False).train()
    set_grad_checkpoint(model)
    optimizer = Optimizer(model, averages=False)
    trained = sum(parameter.numel() for parameter in optimizer.working)
    data = latents(size.trained)

    def step() -> None:
        host.loss(model, data, PROMPT, drop=False).backward()
        optimizer.step()

    step()
    yield {"video": words(size.trained), "trained parameters": trained, **timed(step, 4)}


PARTS: dict[str, Any] = {"sample": sample, "train": train}


def run(part: str, root: Path, size: SimpleNamespace) -> Iterator[Row]:
    gc.collect()  # nothing of one part is in the next
    yield from PARTS[part](Scripts(root, size.network, size.text_length, DEVICE, torch.bfloat16), size)


def main() -> int:
    args = command_line(__doc__, PARTS, "2.0")
    root, size = args.open_sora.resolve(), sizes()[args.size]
    return run_parts({part: partial(run, part, root, size) for part in args.part}, args.out)


if __name__ == "__main__":
    sys.exit(main())
