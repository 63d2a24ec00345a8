"""How benchmarks/long_video.py samples: the clips of every loop of each row, and clips that follow the converged teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from long_video_worlds import SHARED, World
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.atomic import replacing
from opensora_perflow.method.solvers import solve
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.planning.fine_path import uniform_grid
from opensora_perflow.tools.probes import guided_field

FINE, RFLOW = "converged teacher", "rflow, 30 steps"


@dataclass(frozen=True)
class Row:
    """A sampler: its network ("teacher" or "student"), scheduler settings and the host's condition_frame_edit.

    settings: None for the converged teacher.
    reencoded: Are reference frames decoded and encoded in between?
    """

    name: str
    network: str
    nfe: int
    settings: dict[str, Any] | None
    edit: float = 0.0
    reencoded: bool = False


def rows(world: World, joint: dict[str, Any]) -> list[Row]:
    folded = dict(windows=4, guidance=dict(mode="fixed", scale=world.guidance))  # the rest are the defaults

    def host(steps: int) -> Row:
        settings = dict(windows=1, cfg_scale=world.guidance, num_sampling_steps=steps)
        return Row(f"rflow, {steps} steps", "teacher", 2 * steps, settings)

    edit = joint["edit"]
    nfe = 4 if edit in TimeWindows.uniform(4).edges else 5  # frames that join between two grid points cost an evaluation
    return [
        Row(FINE, "teacher", 4 * world.fine_steps[1], None),
        host(30),
        host(4),
        Row("ours, 4 steps", "student", 4, folded),
        *([Row("ours, 4 steps, re-encoded", "student", 4, folded, reencoded=True)] if world.has_codec else []),
        Row(f"ours, 4 steps, edit {edit:g}", "student", nfe, folded, edit),
        Row("ours, 4 steps, joined", "student", nfe, dict(folded, long_video=joint)),
    ]


def clip_of(world: World, network: nn.Module, row: Row, prompts: list[str], z: Tensor, mask: Tensor) -> Tensor:
    """One loop's clips, from noise with reference frames in place; mask: edit ratios [N, T]."""
    sizes = world.sizes(len(z))
    if row.settings is None:
        steps = world.fine_steps[int((mask == 0).any())]
        times = torch.tensor(uniform_grid(steps), dtype=torch.float64)[:, None].expand(-1, len(z))
        field = guided_field(network, world.text, prompts, sizes, world.guidance, mask.bool())
        return solve(field, z, times, method="midpoint")
    scheduler = build_module(dict(type="perflow", **row.settings), SCHEDULERS)
    return scheduler.sample(network, world.text, z, prompts, "cpu", additional_args=sizes, mask=mask, progress=False)


@torch.no_grad()
def clip_after(world: World, network: nn.Module, row: Row, prompts: list[str], noise: Tensor, given: Tensor | None) -> Tensor:
    """One loop's clips, from noise [N, C, T, H, W] and reference frames [N, C, SHARED, H, W]; None in the first loop."""
    z, mask = noise.clone(), torch.ones(len(noise), world.num_frames)
    if given is not None:  # apply_mask_strategy with "loop,ref,-length,0,length,edit"
        z[:, :, :SHARED] = world.reencoded(given) if row.reencoded else given
        mask[:, :SHARED] = row.edit
    return clip_of(world, network, row, prompts, z, mask)


def loop_clips(world: World, network: nn.Module, row: Row, noise: Tensor, prompts: list[str], seed: int) -> Tensor:
    """The clips of every loop, [L, N, C, T, H, W]; noise likewise."""
    torch.manual_seed(seed)  # of the noise that edited frames get
    clips: list[Tensor] = []
    for z in tqdm(noise, desc=row.name, unit="loop"):
        clips.append(clip_after(world, network, row, prompts, z, clips[-1][:, :, -SHARED:] if clips else None))
    return torch.stack(clips)


def followed(loops: int) -> list[int]:
    """Indices of the loops that every row also makes from the converged teacher's reference frames: every third later one."""
    return list(range(1, loops, 3))


def following_clips(
    world: World, network: nn.Module, row: Row, noise: Tensor, prompts: list[str], fine: Tensor, seed: int
) -> Tensor:
    """The clips of the loops `followed`, from the reference frames of the converged teacher's clips `fine` [L, N, ...]."""
    torch.manual_seed(seed)
    at = followed(len(noise))
    given = torch.cat([fine[k - 1][:, :, -SHARED:] for k in at])
    return clip_after(world, network, row, prompts * len(at), noise[at].flatten(0, 1), given).unflatten(0, (len(at), -1))


def joined(clips: Tensor) -> Tensor:
    """One long video of the clips, as the host's script joins them: [N, C, T, H, W]."""
    return torch.cat([clips[0]] + [clip[:, :, SHARED:] for clip in clips[1:]], dim=2)


@dataclass(frozen=True)
class Clips:
    """A row's clips: of every loop [L, N, C, T, H, W], and those that follow the converged teacher's, of loops `followed`."""

    own: Tensor
    following: Tensor

    @classmethod
    def together(cls, parts: Sequence[Clips]) -> Clips:
        """The videos of several noise seeds."""
        return cls(torch.cat([part.own for part in parts], dim=1), torch.cat([part.following for part in parts], dim=1))


def sample(
    world: World, networks: dict[str, nn.Module], joint: dict[str, Any], loops: int, count: int, seed: int, kept: Path | None
) -> dict[str, Clips]:
    """The clips of real videos and of every row, from one noise seed; the teacher's are kept beside the file `kept`."""
    prompts, fresh, at = world.prompts(count), world.num_frames - SHARED, followed(loops)
    real = world.real(prompts, world.num_frames + (loops - 1) * fresh, seed)
    real = torch.stack([real[:, :, k * fresh : k * fresh + world.num_frames] for k in range(loops)])
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(100 + seed))
    found = {"real videos": Clips(real, real[at])}
    for row in rows(world, joint):
        settings = f"{row.name} {row.nfe} {loops}x{count} noise {seed}"
        paths = [
            None if kept is None or row.network == "student" else kept.with_name(f"{settings} {of} {kept.name}")
            for of in ("of", "following, of")
        ]
        call = (world, networks[row.network], row, noise, prompts)
        own = once(paths[0], partial(loop_clips, *call, seed))
        if row.settings is None:
            found[row.name] = Clips(own, own[at])
            continue
        found[row.name] = Clips(own, once(paths[1], partial(following_clips, *call, found[FINE].own, seed)))
    return found


def once(path: Path | None, make: Callable[[], Tensor]) -> Tensor:
    """What `make` returns, or the file that holds the result of an earlier call; no path: nothing is kept."""
    if path is None:
        return make()
    if not path.is_file():
        with replacing(path) as temporary:
            save_file({"clips": make().contiguous()}, temporary)
    return load_file(path)["clips"]
