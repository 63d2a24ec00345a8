"""Long videos by Open-Sora's loops, at few steps: drift, seam and repetition over 8 loops, all in one process.

    python benchmarks/long_video.py [--parts scenes video] [--loops 8] [--seeds 0 1 2] [--out FOLDER]

A loop makes one clip; its last `condition_frame_length` latent frames are the reference frames of the next, which the script
puts into the noise and freezes by their edit ratio (`condition_frame_edit`), and the clips are joined without them. This
follows scripts/inference.py of Open-Sora (v1.2.0's loop, v1.3's hand-over in latents); only the scheduler differs by row:

    rflow           the host's sampler: PeRFlow with one window and CFG (benchmarks/sampler_parity.py)
    ours            a student of the defaults, distilled with frame masks (PeRFlow.training_losses), guidance folded in
    ours, edit      the same with the host's condition_frame_edit, joined as upstream
    ours, joined    the same with scheduler=dict(..., long_video=dict(edit=..., frames=...)): see method/long_video.py
    ours, 5 steps   as many evaluations as joined with an --edit between two grid times, without it

Part "scenes": worlds/scenes.py, a stationary process whose conditional flow is known in closed form, clips of 6
frames, 2 shared. The teacher has no error of its own and real videos have drift 0 and seam 1. Every seed draws new noise, data
and student weights. Part "video": the demo's TinySTDiT and codec on shapes that bounce between walls, clips of 5 latent frames
(20 pixel frames), 2 shared. The shipped teacher never saw a frame mask, so it is first trained on with the masks that
Open-Sora's mask_ratios draw (image_head and quarter_head: the first frames are given); its weights and the student's are kept
in --out and reused when the settings are the same.

Columns (method/metrics.py). NFE: network evaluations a clip and sample; a guided step is 2. Drift: energy distance
of each later loop's clips to those of loop 1, mean over loops, and of the last one; in 1/1000. Seam: temporal-difference energy
at the joints over that inside clips; 1 = cannot be told. Nearest clip: distance of a clip, without reference frames, to the
nearest other one of its video; larger = less repetition, beyond the real videos' it is noise. The row "real" has what real
videos have.

Writes long_video.json, long_video.md, long_video.png and, for part "video", long_video.mp4 with the rows one above the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distil import distil
from matplotlib.figure import Figure
from measures import drift, nearest_clip_distance, seam
from safetensors.torch import load_file, save_file
from scenes import SceneNetwork, Scenes
from torch import Tensor, nn
from tqdm import tqdm
from train_teacher import save_weights, train_teacher

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.atomic import replacing
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.tools.plots import save_figure, side_by_side
from opensora_perflow.worlds.clips import (
    COLORS,
    FPS,
    HEIGHT,
    SHAPES,
    WIDTH,
    draw_shape,
    frames_to_tensor,
    tensor_to_frames,
    write_video,
)
from opensora_perflow.worlds.codec import TinyVAE
from opensora_perflow.worlds.mixture import NUM_CLASSES, ClassText
from opensora_perflow.worlds.model import WEIGHTS, TinySTDiT
from opensora_perflow.worlds.text import TinyTextEncoder

SHARED = 2
"""condition_frame_length, in latent frames."""
AXES = {"left and right": (1.0, 0.0), "up and down": (0.0, 1.0)}  # (x, y)


class World(ABC):
    """What is sampled: networks, text, data and what real long videos look like."""

    num_frames: int
    guidance: float
    batch_size: int
    lr: float

    text: Any
    teacher: nn.Module

    @abstractmethod
    def student(self) -> nn.Module:
        """A new student: the teacher's weights, to be trained."""

    @abstractmethod
    def batch(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Clean latents of clips, and model_args, as Open-Sora's train.py has them."""

    @abstractmethod
    def prompts(self, count: int) -> list[str]: ...

    @abstractmethod
    def real(self, prompts: list[str], num_frames: int, seed: int) -> Tensor:
        """Latents of real long videos, [N, C, T, H, W]."""

    def sizes(self, count: int) -> dict[str, Tensor]:
        return {}


class SceneWorld(World):
    num_frames, guidance, batch_size, lr = 6, 2.0, 256, 2e-3

    def __init__(self) -> None:
        self.scenes, self.text = Scenes.standard(), ClassText()
        self.teacher = SceneNetwork(self.scenes, self.num_frames, width=1).eval()  # untrained, the MLP adds nothing

    def student(self) -> nn.Module:
        return SceneNetwork(self.scenes, self.num_frames)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        class_idx = torch.randint(NUM_CLASSES, (self.batch_size,), generator=generator)
        return self.scenes.draw(class_idx, self.num_frames, generator), self.text.of(class_idx)

    def prompts(self, count: int) -> list[str]:
        return [f"class {i % NUM_CLASSES}" for i in range(count)]

    def real(self, prompts: list[str], num_frames: int, seed: int) -> Tensor:
        class_idx = torch.tensor([int(prompt.split()[1]) for prompt in prompts])
        return self.scenes.draw(class_idx, num_frames, torch.Generator().manual_seed(seed))


class VideoWorld(World):
    """Shapes that bounce between walls; a clip is any piece of such a video."""

    num_frames, guidance, batch_size, lr = 5, 2.0, 12, 2e-4

    def __init__(self, out: Path, steps: list[int], seed: int) -> None:
        self.codec, self.text = TinyVAE(), TinyTextEncoder()
        latents, chosen = self._data(360, 64, seed, out / f"clips_seed{seed}.safetensors")
        # every piece of num_frames latent frames is a clip
        pieces = latents.unfold(2, self.num_frames, 1).movedim(2, 1).movedim(-1, 3)
        self._clips = pieces.flatten(0, 1)
        self._clip_captions = [caption for caption in chosen for _ in range(pieces.shape[1])]
        self._encoded = self.text.encode(self._clip_captions)
        self.weights = WEIGHTS
        for cycle, count in enumerate(steps):
            start = self.weights
            self.weights = out / f"teacher_{'_'.join(map(str, steps[: cycle + 1]))}_seed{seed}.safetensors"
            if self.weights.is_file():
                continue
            teacher, _ = train_teacher(
                self._clips, self._clip_captions, height=HEIGHT, width=WIDTH, steps=count, batch_size=16, lr=6e-4,
                seed=seed + cycle, save_every=50, save=self.weights.with_name("teacher_unfinished.safetensors"), start=start,
                draw_masks=lambda count, generator: head_masks(count, self.num_frames, generator),
            )  # fmt: skip
            save_weights(teacher, self.weights)
        self.teacher = TinySTDiT(from_pretrained=self.weights).eval()
        self.text.y_embedder = self.teacher.y_embedder

    def student(self) -> nn.Module:
        return TinySTDiT(from_pretrained=self.weights)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(self._clips), (self.batch_size,), generator=generator)
        return self._clips[index], {**{key: value[index] for key, value in self._encoded.items()}, **self.sizes(len(index))}

    def prompts(self, count: int) -> list[str]:
        known = captions()
        return [known[i * 7 % len(known)] for i in range(count)]  # 7: neighbours differ in colour, shape and axis

    def real(self, prompts: list[str], num_frames: int, seed: int) -> Tensor:
        rng = np.random.default_rng(1000 + seed)
        return self.encode(np.stack([bouncing_clip(rng, prompt, 4 * num_frames) for prompt in prompts]))

    def sizes(self, count: int) -> dict[str, Tensor]:
        values = {"num_frames": 4 * self.num_frames, "height": HEIGHT, "width": WIDTH, "ar": HEIGHT / WIDTH, "fps": FPS}
        return {key: torch.full((count,), float(value)) for key, value in values.items()}

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 [N, 4 T, H, W, 3] -> latents [N, 4, T, H/8, W/8]. Groups of four frames throughout, as a piece from the middle
        of a video has: codec.encode would repeat the first of every 17 frames, as if each clip began at rest."""
        latents = []
        for part in tqdm(np.array_split(frames, max(1, len(frames) // 10)), desc="encoding clips", unit="batch"):
            groups = self.codec.encode_groups(self.codec.split_groups(frames_to_tensor(part)))
            groups = (groups - self.codec.latent_shift[:, None, None]) / self.codec.latent_scale[:, None, None]
            latents.append(groups.unflatten(0, (len(part), -1)).transpose(1, 2))
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Inverse of `encode`."""
        return tensor_to_frames(
            self.codec.merge_groups(self.codec.decode_groups(latents.transpose(1, 2).flatten(0, 1)), len(latents))
        )

    def _data(self, num_videos: int, num_frames: int, seed: int, kept: Path) -> tuple[Tensor, list[str]]:
        rng, known = np.random.default_rng(seed), captions()
        chosen = [known[i % len(known)] for i in range(num_videos)]
        if not kept.is_file():
            frames = [bouncing_clip(rng, caption, num_frames) for caption in tqdm(chosen, desc="drawing videos", unit="video")]
            with replacing(kept) as temporary:
                save_file({"latents": self.encode(np.stack(frames)).contiguous()}, temporary)
        return load_file(kept)["latents"], chosen


def captions() -> list[str]:
    """Every caption of the bouncing shapes: 6 colours, 3 shapes, 2 axes."""
    return [f"a {color} {shape} bouncing {axis}" for color, shape, axis in itertools.product(COLORS, SHAPES, AXES)]


def bouncing_clip(rng: np.random.Generator, caption: str, num_frames: int) -> np.ndarray:
    """A shape that moves to and fro between two walls, from any point of its way: uint8 [num_frames, H, W, 3]."""
    _, color, shape, _, *axis = caption.split()
    radius = HEIGHT * rng.uniform(0.15, 0.19)
    low, free = radius + 1.5, np.array([WIDTH, HEIGHT], dtype=np.float64) - 2 * (radius + 1.5)
    speed = rng.uniform(0.34, 0.42) / 16  # of the free way, a frame
    way = rng.uniform(0, 2) + speed * np.arange(num_frames)
    along = 1 - np.abs(1 - way % 2)  # 0 at one wall, 1 at the other
    place = np.where(np.array(AXES[" ".join(axis)]) > 0, along[:, None], rng.uniform())
    return draw_shape(color, shape, low + place * free, radius)


def head_masks(count: int, num_frames: int, generator: torch.Generator, share: float = 0.5) -> Tensor:
    """bool [count, T]: in `share` of the samples the first 1..SHARED frames are given (False), in the others none."""
    length = torch.randint(1, SHARED + 1, (count, 1), generator=generator)
    masked = torch.rand(count, 1, generator=generator) < share
    return torch.arange(num_frames) >= torch.where(masked, length, 0)


def train_student(world: World, scheduler: Any, iterations: int, seed: int, kept: Path | None) -> nn.Module:
    """A student trained with frame masks; the calls are those of Open-Sora's train.py with mask_ratios."""
    torch.manual_seed(seed)
    student, generator = world.student().train(), torch.Generator().manual_seed(seed + 2)
    if kept is not None and kept.is_file():
        student.load_state_dict(load_file(kept))
        return student.eval()

    def loss() -> Tensor:
        data, model_args = world.batch(generator)
        mask = head_masks(len(data), world.num_frames, generator)
        return scheduler.training_losses(student, data, {**model_args, "x_mask": mask}, mask=mask)["loss"].mean()

    for _ in distil(student, loss, iterations=iterations, lr=world.lr, desc=f"seed {seed}, distilling"):
        pass
    if kept is not None:
        save_weights(student, kept)
        student.load_state_dict(load_file(kept))  # float16, as a later run will find it
    return student.eval()


@dataclass(frozen=True)
class Row:
    """A sampler: its network ("teacher" or "student"), scheduler settings and the host's condition_frame_edit."""

    name: str
    network: str
    nfe: int
    settings: dict[str, Any]
    edit: float = 0.0


def rows(world: World, joint: dict[str, Any]) -> list[Row]:
    folded = dict(windows=4, guidance=dict(mode="fixed", scale=world.guidance))  # the rest are the defaults

    def host(steps: int) -> Row:
        return Row(
            f"rflow, {steps} steps", "teacher", 2 * steps, dict(windows=1, cfg_scale=world.guidance, num_sampling_steps=steps)
        )

    edit = joint["edit"]
    nfe = 4 if edit in TimeWindows.uniform(4).edges else 5  # frames that join between two grid points cost an evaluation
    return [
        host(30),
        host(4),
        Row("ours, 4 steps", "student", 4, folded),
        Row("ours, 5 steps", "student", 5, dict(folded, num_sampling_steps=5)),
        Row(f"ours, 4 steps, edit {edit:g}", "student", nfe, folded, edit),
        Row("ours, 4 steps, joined", "student", nfe, dict(folded, long_video=joint)),
    ]


@torch.no_grad()
def loop_clips(world: World, network: nn.Module, row: Row, noise: Tensor, prompts: list[str], seed: int) -> Tensor:
    """The clips of every loop, [L, N, C, T, H, W]; noise likewise."""
    scheduler = build_module(dict(type="perflow", **row.settings), SCHEDULERS)
    torch.manual_seed(seed)  # of the noise that edited frames get
    clips: list[Tensor] = []
    for z in tqdm(noise.clone(), desc=row.name, unit="loop"):
        mask = torch.ones(len(z), world.num_frames)
        if clips:  # apply_mask_strategy with "loop,ref,-length,0,length,edit"
            z[:, :, :SHARED] = clips[-1][:, :, -SHARED:]
            mask[:, :SHARED] = row.edit
        clips.append(
            scheduler.sample(
                network, world.text, z, prompts, "cpu", additional_args=world.sizes(len(z)), mask=mask, progress=False
            )
        )
    return torch.stack(clips)


def joined(clips: Tensor) -> Tensor:
    """One long video of the clips, as the host's script joins them: [N, C, T, H, W]."""
    return torch.cat([clips[0]] + [clip[:, :, SHARED:] for clip in clips[1:]], dim=2)


def figures(clips: Tensor) -> dict[str, Any]:
    num_frames, fresh = clips.shape[3], clips.shape[3] - SHARED
    by_loop = drift(clips)
    return {
        "drift": statistics.mean(by_loop),
        "last_drift": by_loop[-1],
        "seam": seam(joined(clips), [num_frames + k * fresh for k in range(len(clips) - 1)]),
        "nearest": nearest_clip_distance(clips[:, :, :, SHARED:]),
        "drift_by_loop": by_loop,
    }


def run_seed(
    world: World, args: argparse.Namespace, iterations: int, count: int, seed: int, kept: Path | None
) -> dict[str, Any]:
    """Every row with one seed."""
    chosen = rows(world, dict(edit=args.edit, frames=args.frames))
    began = time.perf_counter()
    scheduler = build_module(dict(type="perflow", **chosen[2].settings), SCHEDULERS)
    networks = {"teacher": world.teacher, "student": train_student(world, scheduler, iterations, seed, kept)}
    seconds = time.perf_counter() - began
    prompts = world.prompts(count)
    fresh = world.num_frames - SHARED
    real = world.real(prompts, world.num_frames + (args.loops - 1) * fresh, seed)
    real = torch.stack([real[:, :, k * fresh : k * fresh + world.num_frames] for k in range(args.loops)])
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(100 + seed))
    clips = {"real": real}
    results = [{"sampler": "real", "nfe": None, **figures(real)}]
    for row in chosen:
        clips[row.name] = loop_clips(world, networks[row.network], row, noise, prompts, seed)
        results.append({"sampler": row.name, "nfe": row.nfe, **figures(clips[row.name])})
        print({key: value for key, value in results[-1].items() if key != "drift_by_loop"}, flush=True)
    return {"seed": seed, "train_seconds": seconds, "rows": results, "clips": clips, "prompts": prompts}


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a sampler: mean and standard deviation over the seeds."""
    summary = []
    for same in zip(*(result["rows"] for result in results)):
        merged = {key: same[0][key] for key in ("sampler", "nfe")}
        for key in ("drift", "last_drift", "seam", "nearest"):
            values = [row[key] for row in same]
            merged[key] = statistics.mean(values)
            merged[key + "_std"] = statistics.stdev(values) if len(values) > 1 else None
        merged["drift_by_loop"] = np.mean([row["drift_by_loop"] for row in same], axis=0).tolist()
        summary.append(merged)
    return summary


def markdown(part: str, summary: list[dict[str, Any]], seeds: list[int], command: str) -> str:
    """The table, as benchmarks/README.md shows it."""

    def value(row: dict[str, Any], key: str, factor: float, digits: int) -> str:
        text, spread = f"{factor * row[key]:.{digits}f}", row[key + "_std"]
        return text if spread is None else f"{text} ± {factor * spread:.{digits}f}"

    lines = [
        f"`{command}`, part {part}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}", "",
        "| sampler | NFE a clip | drift, 1/1000 | of the last loop | seam | nearest clip |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in summary:
        cells = [
            value(row, "drift", 1e3, 2),
            value(row, "last_drift", 1e3, 2),
            value(row, "seam", 1, 3),
            value(row, "nearest", 1, 3),
        ]
        lines.append(f"| {row['sampler']} | {row['nfe'] or ''} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(summaries: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """For each part: drift over the loops, and seam and nearest clip of every sampler beside the real videos'."""
    drawing = Figure(figsize=(14, 4.0 * len(summaries)), dpi=110, layout="constrained")
    grid = drawing.subplots(len(summaries), 3, squeeze=False)
    for axes, (part, summary) in zip(grid, summaries.items()):
        names = [row["sampler"] for row in summary]
        colors = ["black", "#8a8a8a", "#c8c8c8"] + [f"C{i}" for i in range(len(names) - 3)]
        for row, color in zip(summary, colors):
            loops = range(2, 2 + len(row["drift_by_loop"]))
            axes[0].plot(loops, [1e3 * value for value in row["drift_by_loop"]], marker="o", color=color, label=row["sampler"])
        axes[0].set(xlabel="loop", ylabel="energy distance to loop 1, 1/1000", title=f"{part}: drift")
        axes[0].legend(frameon=False, fontsize=7)
        for axis, key, title in (
            (axes[1], "seam", "seam (1: cannot be told)"),
            (axes[2], "nearest", "distance to the nearest clip"),
        ):
            axis.barh(names, [row[key] for row in summary], xerr=[row[key + "_std"] or 0 for row in summary], color=colors)
            axis.axvline(1.0 if key == "seam" else summary[0]["nearest"], color="black", linewidth=0.8)
            axis.invert_yaxis()
            axis.set_title(title)
    save_figure(drawing, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("scenes", "video"), default=["scenes", "video"])
    parser.add_argument("--loops", type=int, default=8, help="clips of a long video (default 8)")
    parser.add_argument("--edit", type=float, default=0.75, help="flow time of the rows edit and joined (default 0.75)")
    parser.add_argument("--frames", type=int, default=2, help="frames that joined fades over (default 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of part scenes (default 0 1 2)")
    parser.add_argument("--samples", type=int, default=512, help="long videos of part scenes (default 512)")
    parser.add_argument("--iterations", type=int, default=2000, help="training steps of part scenes (default 2000)")
    parser.add_argument("--video-seed", type=int, default=0, help="of part video (default 0)")
    parser.add_argument("--video-samples", type=int, default=144, help="long videos of part video (default 144)")
    parser.add_argument(
        "--teacher-steps", type=int, nargs="+", default=[300, 900, 1500],
        help="steps of each cosine cycle in which the teacher learns masks (default 300 900 1500)",
    )  # fmt: skip
    parser.add_argument("--video-iterations", type=int, default=1500, help="training steps of its student (default 1500)")
    parser.add_argument("--out", type=Path, default=Path("outputs/long_video"), help="folder (default outputs/long_video)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small: more threads wait for each other
    logging.getLogger("opensora_perflow").setLevel(logging.WARNING)
    args.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python benchmarks/long_video.py", *sys.argv[1:]])
    summaries, texts, records = {}, [], {}
    for part in args.parts:
        if part == "scenes":
            world = SceneWorld()
            seeds = args.seeds
            results = [run_seed(world, args, args.iterations, args.samples, seed, None) for seed in seeds]
        else:
            world, seeds = VideoWorld(args.out, args.teacher_steps, args.video_seed), [args.video_seed]
            kept = args.out / f"student_{args.video_iterations}_of_{world.weights.name}"
            results = [run_seed(world, args, args.video_iterations, args.video_samples, args.video_seed, kept)]
            shown = {name: world.decode(joined(clips)[:4]) for name, clips in results[0]["clips"].items()}
            short = [prompt.replace(" bouncing", "\nbouncing") for prompt in results[0]["prompts"][:4]]
            write_video(args.out / "long_video.mp4", side_by_side(shown, short, scale=2), fps=FPS)
        summaries[part] = summarise(results)
        texts.append(markdown(part, summaries[part], seeds, command))
        records[part] = [{key: value for key, value in result.items() if key not in ("clips", "prompts")} for result in results]
        # Written after every part: a run that is stopped leaves what it finished.
        (args.out / "long_video.json").write_text(
            json.dumps({"command": command, "summary": summaries, "seeds": records}, indent=1)
        )
        (args.out / "long_video.md").write_text("\n".join(texts))
        figure(summaries, args.out / "long_video.png")
        print(texts[-1])


if __name__ == "__main__":
    main()
