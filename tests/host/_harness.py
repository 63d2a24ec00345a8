"""What the tests of Open-Sora's real scripts share: clips, configs small enough for a CPU, a way to run a script."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TAIL_LINES = 60

SKIP_REASON = (
    "set OPENSORA_ROOTS=/path/to/Open-Sora-v1.2.0:/path/to/Open-Sora-v1.3 (one or more unmodified checkouts of "
    "hpcaitech/Open-Sora at those tags, joined by ':') and run pytest where the host's packages are installed, see docs"
)
SKIP_REASON_2 = (
    "name an unmodified checkout of hpcaitech/Open-Sora's main branch (2.0) in OPENSORA_ROOTS, and run pytest where the host's "
    "packages and colossalai 0.5.0 are installed, see docs"
)


def host_roots(generation: int = 1) -> list[Path]:
    """Checkouts of Open-Sora 1.x, or of 2.0, that OPENSORA_ROOTS names.

    Raises:
        ValueError: a path in it is no Open-Sora checkout.
    """
    roots = [Path(part).expanduser().resolve() for part in os.environ.get("OPENSORA_ROOTS", "").split(":") if part]
    for root in roots:
        if not (root / "opensora" / "__init__.py").is_file():
            raise ValueError(f"OPENSORA_ROOTS must name Open-Sora checkouts, got {str(root)!r}; it holds no opensora/")
    return [root for root in roots if (tag_of(root) == "2.0") == (generation == 2)]


def tag_of(root: Path) -> str:
    """Which Open-Sora a checkout is, by what it has: "1.0", "1.1", "1.2", "1.3" or "2.0"."""
    if (root / "scripts" / "diffusion").is_dir():
        return "2.0"
    if (root / "scripts" / "inference_i2v.py").is_file():
        return "1.3"
    if (root / "opensora" / "schedulers" / "rf").is_dir():
        return "1.2"
    return "1.1" if (root / "scripts" / "inference-long.py").is_file() else "1.0"


@dataclass(frozen=True)
class Clips:
    """Videos on disk and the table the host's VariableVideoTextDataset reads."""

    csv: Path
    videos: list[Path]
    captions: list[str]


def write_clips(folder: Path, count: int = 4, size: int = 192, num_frames: int = 20, fps: int = 24) -> Clips:
    """Write `count` .mp4 clips of one coloured shape that moves, [num_frames, size, size], and a CSV beside them.

    The host's 17-frame bucket wants at least 18 frames (opensora/datasets/bucket.py compares with >), and 192 x 192 is
    its smallest square, "144p".
    """
    colors = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40)}
    directions = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[0:size, 0:size]
    videos, captions = [], []
    for index in range(count):
        color = list(colors)[index % len(colors)]
        direction = list(directions)[index // len(colors) % len(directions)]
        shape = ("circle", "square")[index % 2]
        videos.append(folder / f"clip{index:02d}.mp4")
        captions.append(f"a {color} {shape} moving {direction}")
        step = np.array(directions[direction]) * size / (2 * num_frames)
        with av.open(str(videos[-1]), mode="w") as container:
            stream = container.add_stream("mpeg4", rate=fps)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            stream.bit_rate = 2_000_000
            for frame_index in range(num_frames):
                center = size / 2 + step * (frame_index - num_frames / 2)
                offsets = rows - center[0], columns - center[1]
                radius = size / 6
                distance = np.hypot(*offsets) if shape == "circle" else np.maximum(*map(np.abs, offsets))
                picture = np.full((size, size, 3), 24, dtype=np.uint8)
                picture[distance < radius] = colors[color]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    table = folder / "clips.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "num_frames", "height", "width", "aspect_ratio", "fps"])
        for video, caption in zip(videos, captions, strict=True):
            writer.writerow([video, caption, num_frames, size, size, 1.0, fps])
    return Clips(table, videos, captions)


def write_config(path: Path, settings: Mapping[str, Any]) -> Path:
    """Write settings as an mmengine config file: one plain assignment per key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    return path


CUSTOM_IMPORTS = {"imports": ["opensora_perflow", "opensora_perflow.hosts.tiny"], "allow_failed_imports": False}


NETWORKS = {
    "1.0": "perflow_tiny_stdit",
    "1.1": "perflow_tiny_stdit2",
    "1.2": "perflow_tiny_stdit3",
    "1.3": "perflow_tiny_stdit3",
}
OWN_SCHEDULER: dict[str, dict[str, Any]] = {
    "1.0": {"type": "iddpm", "timestep_respacing": ""},
    "1.1": {"type": "iddpm", "timestep_respacing": ""},
    "1.2": {"type": "rflow", "use_timestep_transform": True, "num_sampling_steps": 2, "cfg_scale": 7.0},
    "1.3": {"type": "rflow", "use_timestep_transform": True, "num_sampling_steps": 2, "cfg_scale": 7.0},
}
"""What each Open-Sora trains with when nothing of ours is chosen."""


def sampling_scheduler(tag: str) -> dict[str, Any]:
    """OWN_SCHEDULER as inference takes it: two steps. 1.0 and 1.1 name the steps of a sampler otherwise than of training."""
    if tag in ("1.0", "1.1"):
        return {"type": "iddpm", "num_sampling_steps": 2, "cfg_scale": 7.0}
    return dict(OWN_SCHEDULER[tag])


def _networks(tag: str, from_pretrained: Path | None = None) -> dict[str, Any]:
    model = {"type": NETWORKS[tag], "from_pretrained": None if from_pretrained is None else str(from_pretrained)}
    if tag != "1.0":
        model |= {"qk_norm": True, "enable_flash_attn": False, "enable_layernorm_kernel": False}
    return {
        "custom_imports": CUSTOM_IMPORTS,
        "model": model,
        "vae": {"type": "perflow_tiny_vae"},
        "text_encoder": {"type": "perflow_tiny_text"},
    }


def train_config(path: Path, tag: str, clips: Clips, scheduler: Mapping[str, Any], outputs: Path, **overrides: Any) -> Path:
    """Write a config of scripts/train.py: one 192 x 192 x 17 clip a step, one epoch, a checkpoint every two steps.

    Args:
        tag: Result of `tag_of`. 1.0 has no buckets and a network of one size: it is given 64 x 64.
        scheduler: The config's scheduler dict.
        overrides: Further or other top-level keys.
    """
    if tag == "1.0":
        table = clips.csv.with_name("clips_1_0.csv")
        table.write_text("".join(f"{video},{text}\n" for video, text in zip(clips.videos, clips.captions, strict=True)))
        data = {
            "num_frames": 17,
            "frame_interval": 1,
            "image_size": (64, 64),
            "root": None,
            "data_path": str(table),
            "use_image_transform": False,
            "batch_size": 1,
        }
    else:
        data = {
            "dataset": {
                "type": "VariableVideoTextDataset",
                "transform_name": "resize_crop",
                "data_path": str(clips.csv),
                "num_frames": None,
                "frame_interval": 1,
                "image_size": (None, None),
            },
            "bucket_config": {"144p": {17: (1.0, 1)}},
            "num_bucket_build_workers": 1,
            "batch_size": None,
        }
    settings = {
        **_networks(tag),
        **data,
        "scheduler": dict(scheduler),
        "num_workers": 0,
        "dtype": "bf16",
        "plugin": "zero2",
        "sp_size": 1,
        "load": None,
        "grad_checkpoint": False,
        "seed": 42,
        "outputs": str(outputs),
        "wandb": False,
        "epochs": 1,
        "log_every": 1,
        "ckpt_every": 2,
        "lr": 1e-3,
        "grad_clip": 1.0,
        **overrides,
    }
    return write_config(path, settings)


def inference_config(
    path: Path, tag: str, scheduler: Mapping[str, Any], checkpoint: Path, save_dir: Path, **overrides: Any
) -> Path:
    """Write a config of scripts/inference.py (v1.3: of inference_i2v.py too): one 64 x 64 x 17 sample in fp32."""
    prompts = path.with_suffix(".txt")
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("a red circle moving right\n")
    settings = {
        **_networks(tag, checkpoint),
        "scheduler": dict(scheduler),
        "image_size": (64, 64),
        "num_frames": 17,
        "fps": 8,
        "frame_interval": 1,
        "multi_resolution": False if tag == "1.0" else "STDiT2",
        "dtype": "fp32",
        "seed": 42,
        "batch_size": 1,
        "save_dir": str(save_dir),
        "prompt_path": str(prompts),
        "verbose": 2,
        **overrides,
    }
    return write_config(path, settings)


def run_script(
    root: Path,
    script: str,
    *arguments: str | Path,
    nproc: int = 1,
    cwd: Path,
    log: Path | None = None,
    timeout: float = 600,
) -> str:
    """Run `scripts/<script>` of a checkout through opensora_perflow.run and return what it printed.

    Args:
        script: Relative to scripts/: "train.py", and "diffusion/train.py" in 2.0.
        nproc: 1 starts plain Python; more start torchrun with that many processes.
        cwd: Folder to run in (outputs of the host are relative to it).
        log: Where to stream the output; default `cwd`/<script>.log.
        timeout: Seconds.

    Raises:
        AssertionError: the script failed or took too long; shows the last lines of its log.
    """
    command = ["-m", "opensora_perflow.run", str(root / "scripts" / script), *map(str, arguments)]
    return run_python(command, nproc=nproc, log=log or cwd / f"{Path(script).stem}.log", cwd=cwd, timeout=timeout)


def run_python(command: Sequence[str], *, nproc: int, log: Path, cwd: Path, timeout: float = 600) -> str:
    """Run Python, or torchrun where nproc > 1, with the arguments `command`; see `run_script`."""
    if nproc > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc), *command]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        "PYTHONDONTWRITEBYTECODE": "1",  # the checkouts stay as they are
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("w") as stream:
        try:
            options = {"stdout": stream, "stderr": subprocess.STDOUT, "timeout": timeout}
            code = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, **options).returncode
        except subprocess.TimeoutExpired:
            code = f"timeout after {timeout:g} s"
    output = log.read_text(errors="replace")
    if code != 0:
        tail = "\n".join(output.splitlines()[-TAIL_LINES:])
        raise AssertionError(f"{' '.join(command)} ended with {code}; last {TAIL_LINES} lines of {log}:\n{tail}")
    return output


def computes_in_half() -> bool:
    """Does torch have float16 on this CPU? 2.2 has no layer norm of it, 2.4 has."""
    try:
        torch.nn.functional.layer_norm(torch.ones(1, 2, dtype=torch.float16), (2,))
    except RuntimeError:
        return False
    return True


needs_half = pytest.mark.skipif(
    not computes_in_half(),
    reason="torch 2.2 has no float16 on a CPU; run with torch 2.4 and the host's packages",
)


def losses(printed: str) -> list[float]:
    """Losses in train.py's progress bar, in order."""
    return [float(value) for value in re.findall(r"loss=([-+.\deE]+|nan|inf)", printed)]


def checkpoints(outputs: Path) -> list[Path]:
    """Checkpoint folders below `outputs`, in order of their global step."""
    found = [state.parent for state in outputs.glob("*/epoch*-global_step*/running_states.json")]
    return sorted(found, key=lambda folder: int(folder.name.rsplit("step", 1)[1]))


def decode_video(path: Path) -> np.ndarray:
    """All frames of a video, uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def mp4_files(folder: Path) -> Sequence[Path]:
    """The .mp4 files in a folder, by name."""
    return sorted(folder.glob("*.mp4"))
