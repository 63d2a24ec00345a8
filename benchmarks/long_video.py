"""Long videos by Open-Sora's loops, at few steps: beside the converged teacher and real videos, in all loops.

    python benchmarks/long_video.py [--parts scenes video] [--loops 8 24] [--seeds 0 1 2] [--out FOLDER]

A loop makes one clip; its last `condition_frame_length` latent frames are the reference frames of the next, which the script
puts into the noise and freezes by their edit ratio (`condition_frame_edit`), and the clips are joined without them. This
follows scripts/inference.py of Open-Sora (v1.2.0's loop, v1.3's hand-over in latents); only the scheduler differs by row:

    converged       the guided teacher, solved in many midpoint steps (long_video_worlds.py: fine_steps)
    rflow           the host's sampler: PeRFlow with one window and CFG (benchmarks/sampler_parity.py)
    ours            a student of the defaults, distilled with frame masks (PeRFlow.training_losses), guidance folded in
    ours, re-encoded   the same with reference frames that are decoded and encoded in between, as v1.2.0 hands them over
    ours, edit      the same with the host's condition_frame_edit, joined as upstream
    ours, joined    the same with scheduler=dict(..., long_video=dict(edit=..., frames=...)): see method/long_video.py

Part "scenes": benchmarks/scenes.py, a stationary process whose conditional flow is known in closed form, clips of 6
frames, 2 shared. The teacher has no error of its own but for its guidance. Part "video": the demo's TinySTDiT and codec on
shapes that bounce between walls, clips of 5 latent frames (20 pixel frames), 2 shared. The shipped teacher never saw a frame
mask, so it is first trained on with the masks that Open-Sora's mask_ratios draw (image_head and quarter_head: the first frames
are given). Its weights, its videos and the students' weights are kept in --out and reused when the settings are the same.

Every seed is a student of its own (of part scenes also data of its own), and gets several noise seeds, whose videos are
measured together. All rows get the same noise. Columns:

    NFE             network evaluations a clip and sample; a guided step is 2
    to the converged teacher, to real videos    energy distance of a loop's clips to those of the converged teacher, or to as
                    many real ones, in 1/1000; of loop 1, and mean over the later ones
    drift           mean energy distance of the clips of loops 3, 4, ... to those of loop 2, in 1/1000
    seam            temporal-difference energy at the joints over that inside clips; 1 = cannot be told
    nearest clip    distance of a clip, without reference frames, to the nearest other one of its video; larger = less
                    repetition, beyond the real videos' it is noise

The second table follows the converged teacher's videos one clip at a time: in every third later loop (2, 5, 8, ...) each row
also makes the clip that continues the converged teacher's last one, from its noise and reference frames. No error of an
earlier loop is handed on, so that far fewer videos tell rows apart:

    paired distance     root mean square difference to the converged teacher's clip, in latent units; in later loops of the new
                    frames alone. Is it the same map from noise? Rflow solves the teacher's own flow: here its many steps lead
                    to the converged teacher itself
    energy distance     of these clips, reference frames included, to the converged teacher's, in 1/1000. Are continuations
                    distributed alike, whichever of them a noise leads to?

In brackets: the interval that holds 95 % of 1,000 resamples of the videos. Below the tables: how much further away a student's
later loops are than those of rflow at 30 steps, by the same resamples.

Writes long_video.json, long_video.md, long_video.png and, for part "video", long_video.mp4 with the rows one above the other.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distil import distil
from long_video_loops import FINE, RFLOW, Clips, followed, joined, rows, sample
from long_video_worlds import SHARED, SceneWorld, VideoWorld, World, head_masks
from matplotlib.figure import Figure
from measures import Resampled, drift, energy, nearest_clip_distance, root_mean_square, seam, squared_errors
from safetensors.torch import load_file
from torch import Tensor, nn
from train_teacher import save_weights

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.atomic import replacing
from opensora_perflow.tools.plots import save_figure, side_by_side
from opensora_perflow.worlds.clips import FPS, write_video

Runs = dict[str, list[dict[str, Resampled]]]
"""sampler -> the measures of each student."""


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
class Measured:
    """Clips of one student, all noise seeds, beside the converged teacher's and as many real ones, [L, N, C, T, H, W].

    seed: Of the resamples.
    """

    clips: Clips
    fine: Tensor
    real: Tensor
    seed: int

    @cached_property
    def by_loop(self) -> dict[str, list[Resampled]]:
        """The energy distance of each loop's clips to others."""
        others = {"teacher": self.fine, "real": self.real}
        return {name: [energy(*pair, self.seed) for pair in zip(self.clips.own, other)] for name, other in others.items()}

    def following(self, loops: int) -> dict[str, Resampled]:
        """Measures of single clips, from the converged teacher's noise and reference frames, up to this loop."""
        pairs = [(clip, self.fine[k]) for clip, k in zip(self.clips.following, followed(loops))]
        new = torch.stack([squared_errors(clip[:, :, SHARED:], fine[:, :, SHARED:]) for clip, fine in pairs])
        return {
            "pair_first": root_mean_square(squared_errors(self.clips.own[0], self.fine[0]), self.seed),
            "pair_later": root_mean_square(new.mean(dim=0), self.seed),
            "following": Resampled.mean([energy(*pair, self.seed) for pair in pairs]),
        }

    def figures(self, loops: int) -> dict[str, Resampled]:
        """All measures of the first loops."""
        clips, num_frames, found = self.clips.own[:loops], self.fine.shape[3], {}
        for name, distances in self.by_loop.items():
            found[f"{name}_first"], found[f"{name}_later"] = distances[0], Resampled.mean(distances[1:loops])
        joints = [num_frames + k * (num_frames - SHARED) for k in range(loops - 1)]
        return {
            **found,
            **self.following(loops),
            "drift": drift(clips, self.seed),
            "seam": seam(joined(clips), joints, self.seed),
            "nearest": nearest_clip_distance(clips[:, :, :, SHARED:], self.seed),
        }


MEASURES = {
    "teacher_first": ("to the converged teacher, loop 1", 1e3, 2), "teacher_later": ("later loops", 1e3, 2),
    "real_first": ("to real videos, loop 1", 1e3, 2), "real_later": ("later loops", 1e3, 2), "drift": ("drift", 1e3, 2),
    "seam": ("seam", 1.0, 3), "nearest": ("nearest clip", 1.0, 3),
}  # fmt: skip
FOLLOWING = {
    "pair_first": ("paired distance, loop 1", 1.0, 4), "pair_later": ("later loops", 1.0, 4),
    "following": ("energy distance, later loops", 1e3, 3),
}  # fmt: skip
"""Columns of both tables: head, unit and digits."""
COMPARED = {
    "teacher_later": "to the converged teacher", "real_later": "to real videos", "pair_later": "following it, paired",
    "following": "following it, energy distance",
}  # fmt: skip


def cell(found: Resampled, factor: float, digits: int) -> str:
    value, low, high = (f"{factor * number:.{digits}f}" for number in vars(found.estimate).values())
    return f"{value} ({low} to {high})"


def table(runs: Runs, nfe: dict[str, int], columns: dict[str, tuple[str, float, int]]) -> list[str]:
    """One row a sampler, mean of its students."""
    heads = ["sampler", "NFE a clip", *(head for head, _, _ in columns.values())]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, found in runs.items():
        cells = [cell(Resampled.mean([run[key] for run in found]), *form) for key, (_, *form) in columns.items()]
        lines.append(f"| {name} | {nfe.get(name, '')} | {' | '.join(cells)} |")
    return lines


def markdown(part: str, runs: Runs, nfe: dict[str, int], students: str, command: str) -> str:
    """The tables, as benchmarks/README.md shows them, and each student's excess over rflow at 30 steps."""
    lines = [f"`{command}`, part {part}, {students}", "", *table(runs, nfe, MEASURES)]
    lines += ["", "One clip at a time, from the noise and the reference frames of the converged teacher's:", ""]
    lines += table({name: found for name, found in runs.items() if name in nfe and name != FINE}, nfe, FOLLOWING)
    lines += ["", f"Later loops, less those of {RFLOW}; each student's in brackets:", ""]
    for name in [name for name in runs if name.startswith("ours")]:
        said = []
        for key, text in COMPARED.items():
            each = [run[key] - host[key] for run, host in zip(runs[name], runs[RFLOW])]
            _, factor, digits = (MEASURES | FOLLOWING)[key]
            own = ", ".join(f"{factor * one.value:.{digits}f}" for one in each)
            said.append(f"{text} {cell(Resampled.mean(each), factor, digits)} [{own}]")
        lines.append(f"* {name}: {'; '.join(said)}")
    return "\n".join(lines) + "\n"


def figure(by_loop: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """For each part: the distances to the converged teacher and to real videos, loop by loop."""
    drawing = Figure(figsize=(11, 4.0 * len(by_loop)), dpi=110, layout="constrained")
    grid = drawing.subplots(len(by_loop), 2, squeeze=False)
    for axes, (part, samplers) in zip(grid, by_loop.items()):
        for (other, title), axis in zip((("teacher", "the converged teacher"), ("real", "real videos")), axes):
            for name, found in samplers.items():
                axis.plot(range(1, 1 + len(found[other])), [1e3 * value for value in found[other]], label=name)
            axis.set(xlabel="loop", ylabel="energy distance, 1/1000", title=f"{part}: to {title}")
        axes[1].legend(frameon=False, fontsize=7)
    save_figure(drawing, path)


def run_part(world: World, args: argparse.Namespace, part: str) -> tuple[dict[int, Runs], dict[str, Any], dict[str, Clips]]:
    """Measures for each number of loops, what the figure shows, and the clips of the last student."""
    is_video, joint = part == "video", dict(edit=args.edit, frames=args.frames)
    iterations, count = (args.video_iterations, args.video_samples) if is_video else (args.iterations, args.samples)
    runs: dict[int, Runs] = {loops: {} for loops in args.loops}
    by_loop: dict[str, dict[str, list[list[float]]]] = {}
    clips: dict[str, Clips] = {}
    for seed in args.video_seeds if is_video else args.seeds:
        scheduler = build_module(dict(type="perflow", **rows(world, joint)[3].settings), SCHEDULERS)
        kept = args.out / f"student_{iterations}_seed{seed}_of_{world.weights.name}" if is_video else None
        began = time.process_time()
        student = train_student(world, scheduler, iterations, seed, kept)
        print(f"student {seed}: {time.process_time() - began:.0f} CPU seconds", flush=True)
        networks = {"teacher": world.teacher, "student": student}
        numbers = [noise if is_video else 100 * seed + noise for noise in args.noise_seeds]  # one teacher: videos are shared
        where = world.weights if is_video else None
        parts = [sample(world, networks, joint, max(args.loops), count, number, where) for number in numbers]
        clips = {name: Clips.together([part[name] for part in parts]) for name in parts[0]}
        for name, found in clips.items():
            measured = Measured(found, clips[FINE].own, clips["real videos"].own, 0 if is_video else seed)
            for loops, measures in runs.items():
                measures.setdefault(name, []).append(measured.figures(loops))
            for other, distances in measured.by_loop.items():
                by_loop.setdefault(name, {}).setdefault(other, []).append([one.value.item() for one in distances])
    means = {name: {other: np.mean(each, axis=0).tolist() for other, each in of.items()} for name, of in by_loop.items()}
    return runs, means, clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("scenes", "video"), default=["scenes", "video"])
    parser.add_argument("--loops", type=int, nargs="+", default=[8, 24], help="clips of a long video, 3 or more (default 8 24)")
    parser.add_argument("--edit", type=float, default=0.75, help="flow time of the rows edit and joined (default 0.75)")
    parser.add_argument("--frames", type=int, default=2, help="frames that joined fades over (default 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="students of part scenes (default 0 1 2)")
    parser.add_argument("--noise-seeds", type=int, nargs="+", default=[0, 1, 2], help="of each student (default 0 1 2)")
    parser.add_argument("--samples", type=int, default=256, help="long videos of part scenes, a noise seed (default 256)")
    parser.add_argument("--iterations", type=int, default=2000, help="training steps of part scenes (default 2000)")
    parser.add_argument("--video-seeds", type=int, nargs="+", default=[0, 1, 2], help="students of part video (default 0 1 2)")
    parser.add_argument("--video-samples", type=int, default=16, help="long videos of part video, a noise seed (default 16)")
    parser.add_argument(
        "--teacher-steps", type=int, nargs="+", default=[300, 900, 1500],
        help="steps of each cosine cycle in which the teacher learns masks (default 300 900 1500)",
    )  # fmt: skip
    parser.add_argument("--video-iterations", type=int, default=640, help="training steps of its students (default 640)")
    parser.add_argument("--out", type=Path, default=Path("outputs/long_video"), help="folder (default outputs/long_video)")
    args = parser.parse_args()
    if min(args.loops) < 3:
        parser.error(f"--loops {min(args.loops)}: drift compares loops 3, 4, ... with loop 2; give 3 or more")
    torch.set_num_threads(1)  # the networks are small: more threads wait for each other
    logging.getLogger("opensora_perflow").setLevel(logging.WARNING)
    args.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python benchmarks/long_video.py", *sys.argv[1:]])
    texts, records, by_loop = [], {}, {}
    for part in args.parts:
        world = SceneWorld() if part == "scenes" else VideoWorld(args.out, args.teacher_steps, 0)
        runs, by_loop[part], clips = run_part(world, args, part)
        if part == "video":
            shown = {name: world.decode(joined(found.own)[:4]) for name, found in clips.items()}
            short = [prompt.replace(" bouncing", "\nbouncing") for prompt in world.prompts(4)]
            write_video(args.out / "long_video.mp4", side_by_side(shown, short, scale=2), fps=FPS)
        students = f"seeds {args.video_seeds if part == 'video' else args.seeds}, noise {args.noise_seeds}"
        nfe = {row.name: row.nfe for row in rows(world, dict(edit=args.edit, frames=args.frames))}
        texts += [markdown(part, found, nfe, f"{loops} loops, {students}", command) for loops, found in runs.items()]
        records[part] = {
            loops: {name: [estimates(run) for run in found] for name, found in measured.items()}
            for loops, measured in runs.items()
        }
        # Written after every part: a run that is stopped leaves what it finished.
        record = {"command": command, "cpu_seconds": time.process_time(), "by_loop": by_loop, "runs": records}
        for name, text in (("long_video.json", json.dumps(record, indent=1)), ("long_video.md", "\n".join(texts))):
            with replacing(args.out / name) as path:
                path.write_text(text)
        figure(by_loop, args.out / "long_video.png")
        print("\n".join(texts[-len(args.loops) :]), f"{time.process_time():.0f} CPU seconds so far", sep="\n", flush=True)


def estimates(run: dict[str, Resampled]) -> dict[str, dict[str, float]]:
    """JSON of a run's measures."""
    return {name: vars(found.estimate) for name, found in run.items()}


if __name__ == "__main__":
    main()
