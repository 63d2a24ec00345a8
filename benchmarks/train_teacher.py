"""Make the demo's weights: train the tiny VAE, then the tiny STDiT3 teacher by rectified flow.

    python benchmarks/train_teacher.py --out opensora_perflow/worlds/weights --seed 0

The teacher learns, for data x and noise e (t = 1 is noise), at x_t = (1 - t) x + t e the host's velocity x - e, at host
timestep 1000 t, with a tenth of the texts replaced by the null text so that guidance works. Writes codec.safetensors,
teacher.safetensors (float16; averaged weights) and training.json (settings and losses) into --out; the files are also
written every few hundred steps, so that a usable teacher exists early. About 35 minutes on 2 idle CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from opensora_perflow.atomic import replacing
from opensora_perflow.objectives import mean_over_frames
from opensora_perflow.worlds.clips import FPS, frames_to_tensor, make_clip
from opensora_perflow.worlds.codec import TinyVAE
from opensora_perflow.worlds.model import TinySTDiT
from opensora_perflow.worlds.text import TinyTextEncoder

LATENT_NOISE = 0.1  # added to normalised latents while the codec trains: the decoder forgives a sampler's small errors
FRAME_RATES = (FPS, 12, 16, 24, 30)  # the clips look the same at any of them, so the teacher learns to ignore fps


def make_clips(num_clips: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """`num_clips` random clips, uint8 [N, T, H, W, 3], and their captions."""
    rng = np.random.default_rng(seed)
    frames, captions = zip(*(make_clip(rng) for _ in tqdm(range(num_clips), desc="drawing clips", unit="clip")))
    return np.stack(frames), list(captions)


def train_codec(frames: np.ndarray, *, steps: int, batch_size: int, lr: float, seed: int) -> tuple[TinyVAE, float]:
    """Train a TinyVAE on clips uint8 [N, T, H, W, 3].

    While training, latents are normalised by the batch's own statistics; afterwards the averages over the clips become
    the codec's `latent_shift` and `latent_scale`, so shipped latents have zero mean and unit variance.

    Args:
        frames: Clips.
        steps, batch_size: Optimizer steps, and groups of four frames in each.
        lr: Peak learning rate.
        seed: Of weights, batches and latent noise.

    Returns:
        (codec in eval mode with averaged weights, mean squared error of the last steps on [-1, 1] pixels).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    codec = TinyVAE(pretrained=False).train()
    average = copy.deepcopy(codec).eval()
    # a group is four frames of a clip; groups are cut here once, in the codec's own layout
    index = codec._group_frames(frames.shape[1])
    groups = torch.from_numpy(frames[:, index]).movedim(-1, 1)  # [N, 3, 4n, H, W] uint8
    groups = codec.split_groups(groups).contiguous()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    losses: list[float] = []
    bar = tqdm(range(steps), desc="codec", unit="step")
    for step in bar:
        _set_lr(optimizer, lr, step, steps)
        pick = torch.randint(len(groups), (batch_size,), generator=generator)
        pixels = groups[pick].float() / 127.5 - 1.0
        latents = codec.encode_groups(pixels)
        mean = latents.mean(dim=(0, 2, 3), keepdim=True)
        std = latents.std(dim=(0, 2, 3), keepdim=True) + 1e-6
        # unit variance before the noise: the encoder cannot drown the noise by growing
        noisy = (latents - mean) / std + LATENT_NOISE * torch.randn(latents.shape, generator=generator)
        decoded = codec.decode_groups(noisy)
        error = decoded - pixels
        loss = error.square().mean() + 0.1 * error.abs().mean()
        _step(optimizer, codec, loss)
        _average(average, codec, min(0.998, step / (step + 10)))
        losses.append(float(error.detach().square().mean()))
        if step % 20 == 0:
            bar.set_postfix(mse=f"{np.mean(losses[-50:]):.5f}", psnr=f"{_psnr(losses):.1f}")
    _measure_latents(average, groups)
    return average.eval(), float(np.mean(losses[-100:]))


@torch.no_grad()
def _measure_latents(codec: TinyVAE, groups: Tensor) -> None:
    latents = torch.cat([codec.encode_groups(part.float() / 127.5 - 1.0) for part in groups[:4000].split(250)])
    shift, scale = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    codec.latent_shift.copy_(shift)
    codec.latent_scale.copy_(scale)


def encode_clips(codec: TinyVAE, frames: np.ndarray) -> Tensor:
    """Latents float32 [N, 4, T', H', W'] of clips uint8 [N, T, H, W, 3]."""
    latents = []
    with torch.no_grad():
        for start in tqdm(range(0, len(frames), 50), desc="encoding clips", unit="batch"):
            latents.append(codec.encode(frames_to_tensor(frames[start : start + 50])))
    return torch.cat(latents)


def train_teacher(
    latents: Tensor,
    captions: list[str],
    *,
    height: int,
    width: int,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    save_every: int,
    save: Path,
    start: Path | None = None,
    draw_masks: Callable[[int, torch.Generator], Tensor] | None = None,
) -> tuple[TinySTDiT, float]:
    """Train a TinySTDiT by rectified flow.

    Args:
        latents: Clean latents [N, 4, T', H', W'].
        captions: N texts.
        height, width: Of the videos in pixels; the network is told.
        steps, batch_size, lr, seed: As in `train_codec`.
        save_every: Steps between two writes of the averaged weights to `save`.
        save: safetensors file.
        start: safetensors file of weights to go on from; None: random ones.
        draw_masks: (batch size, generator) -> bool [B, T'], True = generated frame. The others stay clean, the network is
            told so, and they do not count (as Open-Sora trains with mask_ratios). None: every frame is generated.

    Returns:
        (averaged network in eval mode, mean squared velocity error of the last steps).
    """
    torch.manual_seed(seed + 1)
    generator = torch.Generator().manual_seed(seed + 1)
    model = TinySTDiT(from_pretrained=start).train()
    average = copy.deepcopy(model).eval()
    text_encoder = TinyTextEncoder()
    # 72 different captions at most: encode each once
    known = sorted(set(captions))
    encoded = text_encoder.encode(known)
    which = torch.tensor([known.index(caption) for caption in captions])
    sizes = {"height": torch.full((1,), float(height)), "width": torch.full((1,), float(width))}
    decayed = [p for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1 and "table" not in name]
    others = [p for name, p in model.named_parameters() if p.requires_grad and not (p.ndim > 1 and "table" not in name)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.99)
    )
    losses: list[float] = []
    bar = tqdm(range(steps), desc="teacher", unit="step")
    for step in bar:
        _set_lr(optimizer, lr, step, steps)
        pick = torch.randint(len(latents), (batch_size,), generator=generator)
        data, text = latents[pick], which[pick]
        noise = torch.randn(data.shape, generator=generator)
        # one t in each of batch_size equal slices of [0, 1]: same distribution, less variance than independent draws
        t = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        t_wide = t[:, None, None, None, None]
        x_t = (1 - t_wide) * data + t_wide * noise
        fps = torch.tensor(FRAME_RATES)[torch.randint(len(FRAME_RATES), (batch_size,), generator=generator)].float()
        frames = None if draw_masks is None else draw_masks(batch_size, generator)
        if frames is not None:
            x_t = torch.where(frames[:, None, :, None, None], x_t, data)
        out = model(x_t, 1000 * t, encoded["y"][text], mask=encoded["mask"][text], x_mask=frames, fps=fps, **sizes)
        error = out[:, : data.shape[1]] - (data - noise)
        loss = mean_over_frames(error.square(), None if frames is None else frames.float()).mean()
        _step(optimizer, model, loss)
        _average(average, model, min(0.999, step / (step + 10)))
        losses.append(float(loss.detach()))
        if step % 20 == 0:
            bar.set_postfix(mse=f"{np.mean(losses[-200:]):.4f}")
        if (step + 1) % save_every == 0:
            save_weights(average, save)
    return average.eval(), float(np.mean(losses[-200:]))


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's state dict as float16 safetensors; the file is replaced in one go."""
    with replacing(path) as temporary:
        save_file({name: value.detach().half().contiguous() for name, value in module.state_dict().items()}, temporary)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the demo's codec and teacher.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and training.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=8000, help="clips drawn for the teacher; the codec uses 1500 of them")
    parser.add_argument("--codec-steps", type=int, default=3000, help="0 keeps the codec that is in --out")
    parser.add_argument("--codec-batch", type=int, default=32, help="groups of four frames a step")
    parser.add_argument("--codec-lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=6000, help="teacher steps; 0 trains the codec alone")
    parser.add_argument("--batch", type=int, default=64, help="clips a step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)

    started = time.time()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    report_path = args.out / "training.json"
    report = json.loads(report_path.read_text()) if report_path.is_file() else {}
    frames, captions = make_clips(args.clips, args.seed)

    codec_path = args.out / "codec.safetensors"
    if args.codec_steps:
        codec, mse = train_codec(
            frames[:1500], steps=args.codec_steps, batch_size=args.codec_batch, lr=args.codec_lr, seed=args.seed
        )
        save_weights(codec, codec_path)
        report["codec"] = _settings(args, ("seed", "codec_steps", "codec_batch", "codec_lr"), codec, mse, started)
    # from the file in any case: the teacher learns the latents of the float16 weights that are shipped
    codec = TinyVAE(pretrained=False)
    codec.load_state_dict(load_file(codec_path))

    if args.steps:
        started = time.time()
        teacher_path = args.out / "teacher.safetensors"
        teacher, mse = train_teacher(
            encode_clips(codec, frames),
            captions,
            height=frames.shape[2],
            width=frames.shape[3],
            steps=args.steps,
            batch_size=args.batch,
            lr=args.lr,
            seed=args.seed,
            save_every=args.save_every,
            save=teacher_path,
        )
        save_weights(teacher, teacher_path)
        report["teacher"] = _settings(args, ("seed", "clips", "steps", "batch", "lr"), teacher, mse, started)
    report_path.write_text(json.dumps(report, indent=2) + "\n")


def _settings(
    args: argparse.Namespace, names: tuple[str, ...], module: nn.Module, mse: float, started: float
) -> dict[str, float | int | str]:
    return {
        **{name: getattr(args, name) for name in names},
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "final_mse": round(mse, 6),
        "minutes": round((time.time() - started) / 60, 1),
        "threads": args.threads,
        "torch": torch.__version__,
    }


def _set_lr(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """200 steps of linear warm-up, then a half cosine down to a hundredth of the peak."""
    warm = min(1.0, (step + 1) / 200)
    for group in optimizer.param_groups:
        group["lr"] = peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _step(optimizer: torch.optim.Optimizer, module: nn.Module, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def _average(average: nn.Module, module: nn.Module, decay: float) -> None:
    for mean, new in zip(average.parameters(), module.parameters()):
        mean.lerp_(new, 1 - decay)


def _psnr(losses: list[float]) -> float:
    """dB, for a peak-to-peak range of 2."""
    return 10 * math.log10(4 / max(float(np.mean(losses[-50:])), 1e-12))


if __name__ == "__main__":
    main()
