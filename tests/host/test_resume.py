"""Resuming Open-Sora's real train.py, and the groups that it makes for sequence parallelism."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from _harness import Clips, checkpoints, inference_config, run_python, run_script, tag_of, train_config, write_clips

from opensora_perflow.training.state import find_state

pytestmark = pytest.mark.host
WORKERS = Path(__file__).parent
WARP = {"1.0": {}, "1.1": {}, "1.2": {"use_timestep_transform": True}, "1.3": {"use_timestep_transform": True}}


def train(root: Path, clips: Clips, folder: Path, *options: object, **scheduler: Any) -> tuple[list[dict], Path]:
    """Two epochs of four steps, saved every third: (what each step drew, outputs folder)."""
    return run(root, clips, folder, *options, epochs=2, ckpt_every=3, **scheduler)


def run(
    root: Path, clips: Clips, folder: Path, *options: object, epochs: int, ckpt_every: int, nproc: int = 1, **scheduler: Any
) -> tuple[list[dict], Path]:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"type": "perflow", **WARP[tag_of(root)], "draws": {"per_solve": 2}, **scheduler}
    outputs = folder / "outputs"
    config = train_config(folder / "config.py", tag_of(root), clips, settings, outputs, epochs=epochs, ckpt_every=ckpt_every)
    command = [WORKERS / "_recording_run.py", folder, root / "scripts" / "train.py", config, *options]
    run_python([str(part) for part in command], nproc=nproc, log=folder / "train.log", cwd=folder)
    return torch.load(folder / "draws-0.pt"), outputs


@pytest.fixture(scope="module")
def whole(host_root: Path, clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path, Path]:
    """Eight steps without a stop: (their draws, the checkpoint after three, the teacher's weights)."""
    folder = tmp_path_factory.mktemp("whole")
    drawn, outputs = train(host_root, clips, folder)
    return drawn, checkpoints(outputs)[0], folder / "teacher.safetensors"


def test_a_resumed_run_draws_what_the_whole_one_drew(
    host_root: Path, host_tag: str, clips: Clips, whole: tuple, tmp_path: Path
) -> None:
    """8 steps = 3 + 5, over the end of an epoch. Exactly; and the file that the second part has its teacher from is the copy
    of the student that the first part made, to the last bit. train.py of 1.0 and 1.1 draws the times itself, with a generator
    that it seeds anew when it resumes: there only the rest is the same."""
    drawn, checkpoint, weights = whole
    state, path = find_state(checkpoint / "model")
    assert path == checkpoint / "perflow.json" and state.steps == 3 and state.draws["seed"] == 42
    rest, outputs = train(host_root, clips, tmp_path, "--load", checkpoint, teacher={"from_pretrained": str(weights)})
    assert "PeRFlow goes on after 3 training steps" in (tmp_path / "train.log").read_text()
    assert (len(drawn), len(rest)) == (8, 5)
    for one, other in zip(drawn[3:], rest, strict=True):
        for name in ("noise",) if host_tag in ("1.0", "1.1") else ("windows", "edges", "times", "noise"):
            assert torch.equal(one[name], other[name]), name
    assert not torch.equal(drawn[0]["noise"], drawn[3]["noise"])
    again, _ = find_state(checkpoints(outputs)[-1])
    assert again.steps == 6 and again.teacher == state.teacher and again.windows == state.windows


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_resumed_run_has_the_losses_of_the_whole_one(host_root: Path, host_tag: str, nproc: int, tmp_path: Path) -> None:
    """20 steps = 10 + 10, to the last bit: weights, Adam's moments and draws are those of the unbroken run. Clips of 18 frames
    leave the host's random crop to 17 one choice. Without the masters the network itself is the same, so the first loss is."""
    if host_tag in ("1.0", "1.1"):
        pytest.skip("train.py of 1.0 and 1.1 draws the times itself, and other ones after a resume")
    clips = write_clips(tmp_path / "clips", num_frames=18)
    options = {"epochs": 5 * nproc, "ckpt_every": 10, "nproc": nproc}
    _, outputs = run(host_root, clips, tmp_path / "whole", **options)
    checkpoint, weights = checkpoints(outputs)[0], tmp_path / "whole" / "teacher.safetensors"
    assert len(list((checkpoint / "perflow_masters").iterdir())) == nproc

    def resumed(name: str) -> tuple[str, list[bool]]:
        """The log's line, and which of the ten losses are those of the whole run, in all processes."""
        run(host_root, clips, tmp_path / name, "--load", checkpoint, teacher={"from_pretrained": str(weights)}, **options)
        same = []
        for rank in range(nproc):
            one, other = (
                [step["loss"] for step in torch.load(tmp_path / part / f"draws-{rank}.pt")] for part in ("whole", name)
            )
            assert (len(one), len(other)) == (20, 10)
            same.append([torch.equal(a, b) for a, b in zip(one[10:], other, strict=True)])
        (line,) = (line for line in (tmp_path / name / "train.log").read_text().splitlines() if "PeRFlow goes on" in line)
        return line, [all(of) for of in zip(*same, strict=True)]

    line, same = resumed("kept")
    assert line.endswith("and with its float32 masters") and all(same)
    if nproc == 1:
        shutil.rmtree(checkpoint / "perflow_masters")
        line, same = resumed("lost")
        assert "rounded weights, because ZeRO's float32 masters cannot be put back" in line and "missing" in line
        assert same[0] and not any(same[2:])


def test_changed_windows_are_refused(host_root: Path, clips: Clips, whole: tuple, tmp_path: Path) -> None:
    _, checkpoint, weights = whole
    with pytest.raises(AssertionError, match=r"windows was \(1\.0, 0\.75.*, now \(1\.0, 0\.5, 0\.0\).*allow_change=True"):
        train(host_root, clips, tmp_path, "--load", checkpoint, windows=2, teacher={"from_pretrained": str(weights)})
    assert checkpoints(tmp_path / "outputs") == []


def test_sampling_with_other_windows_warns(host_root: Path, whole: tuple, tmp_path: Path) -> None:
    _, checkpoint, _ = whole
    tag = tag_of(host_root)
    scheduler = {"type": "perflow", "windows": 2, "num_sampling_steps": 2, **WARP[tag]}
    config = inference_config(tmp_path / "sample.py", tag, scheduler, checkpoint, tmp_path / "samples")
    printed = run_script(host_root, "inference.py", config, cwd=tmp_path)
    assert printed.count("windows trained (1.0, 0.75, 0.5, 0.25, 0.0), asked (1.0, 0.5, 0.0)") == 1


def test_a_sequence_parallel_group_draws_the_same(host_root: Path, tmp_path: Path) -> None:
    """Two processes, with the groups that the host makes for zero2-seq: same latents, windows, times, noise, starts and
    dropped texts; with those of zero2 other ones. Only the draws: alltoall, which splits the network over the group, needs
    nccl and CUDA and was not run."""
    command = [str(WORKERS / "_sequence_worker.py"), str(host_root), str(tmp_path)]
    run_python(command, nproc=2, log=tmp_path / "sequence.log", cwd=tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(one["zero2-seq"]) == len(other["zero2-seq"]) > 12
    assert all(map(torch.equal, one["zero2-seq"], other["zero2-seq"]))
    assert not any(torch.equal(a, b) for a, b in zip(one["zero2"][:3], other["zero2"][:3], strict=True))
