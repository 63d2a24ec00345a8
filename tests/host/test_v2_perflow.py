"""Students of Open-Sora 2.0: its real MMDiT, tiny, and its unmodified train.py and inference.py."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _harness import Clips, checkpoints, decode_video, losses, mp4_files, needs_half, run_python, run_script
from _harness_v2 import TINY_FLUX, inference_config_v2, train_config_v2
from safetensors.torch import load_file
from torch import Tensor

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.training.fake_score import FILE_NAME
from opensora_perflow.training.state import find_state

pytestmark = pytest.mark.host
WORKERS = Path(__file__).parent
IMPORTS = {"imports": ["opensora_perflow", "opensora_perflow.hosts.v2.tiny"], "allow_failed_imports": False}
SCALES = [7.0, 4.4, 4.1, 4.1]
FIXED = {"guidance": {"mode": "fixed", "scale": SCALES}}
LORA = {"r": 4, "lora_alpha": 4, "target_modules": ["img_attn.proj", "img_mlp.0", "q_proj", "linear2"]}
CHECKS = re.findall(r"^def check_(\w+)", (WORKERS / "_v2_worker.py").read_text(), re.M)
TWO_TIME = {"guidance": {"mode": "fixed", "scale": 3.0}, "draws": {"grids": [1, 2], "two_time": True}}


@pytest.fixture(scope="module")
def checked(host2_root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What _v2_worker.py says of everything that it checks."""
    folder = tmp_path_factory.mktemp("network2")
    return run_python([str(WORKERS / "_v2_worker.py"), str(host2_root)], nproc=1, log=folder / "log", cwd=folder)


@pytest.mark.parametrize("name", CHECKS)
def test_the_real_network(checked: str, name: str) -> None:
    assert f"{name} holds" in checked.splitlines(), checked


@dataclass(frozen=True)
class Trained:
    """What a run of train.py left. draws: Of each process."""

    outputs: Path
    printed: str
    draws: list[list[dict[str, Tensor]]]

    @property
    def checkpoints(self) -> list[Path]:
        return checkpoints(self.outputs)

    def weights(self, index: int = -1) -> dict[str, Tensor]:
        files = (self.checkpoints[index] / "model").glob("*.safetensors")
        return {name: value for file in files for name, value in load_file(file).items()}


def settings(perflow: dict[str, Any] | None, model: dict[str, Any] | None = None, **overrides: Any) -> dict[str, Any]:
    network = {"type": "perflow_flux", **(model or {}), "perflow": perflow}
    return {"custom_imports": IMPORTS, "model": network, **overrides}


def train(
    root: Path, clips: Clips, folder: Path, perflow: dict[str, Any] | None, *options: object, nproc: int = 1, **overrides: Any
) -> Trained:
    config = train_config_v2(folder / "train.py", clips, folder / "outputs", **settings(perflow, **overrides))
    command = [WORKERS / "_recording_run.py", folder, root / "scripts" / "diffusion" / "train.py", config, *options]
    printed = run_python([str(part) for part in command], nproc=nproc, log=folder / "train.log", cwd=folder)
    draws = [torch.load(folder / f"draws-{rank}.pt") for rank in range(nproc)]
    return Trained(folder / "outputs", printed, draws)


def sample(root: Path, folder: Path, checkpoint: Path | None, perflow: dict[str, Any] | None, **overrides: Any) -> str:
    """What inference.py printed; it wrote one video of 9 frames."""
    model = {"type": "perflow_flux", **overrides.pop("model", {}), "perflow": perflow}
    overrides = {"custom_imports": IMPORTS, "model": model, **overrides}
    config = inference_config_v2(folder / "sample.py", checkpoint, folder / "samples", **overrides)
    if checkpoint is None:
        config.write_text(config.read_text().replace("'from_pretrained': 'None'", "'from_pretrained': None"))
    printed = run_script(root, "diffusion/inference.py", config, cwd=folder)
    (video,) = mp4_files(folder / "samples" / "video_64px")
    assert decode_video(video).shape == (9, 64, 64, 3)
    return printed


def is_sound(run: Trained, steps: int) -> None:
    found = losses(run.printed)
    assert found and np.isfinite(found).all()
    assert [len(draws) for draws in run.draws] == [steps] * len(run.draws)
    assert run.printed.count("PeRFlow teacher: ") == 1  # the first process speaks


@pytest.fixture(scope="module")
def student(host2_root: Path, small_clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Eight steps with ZeRO-2, one scale a window and every kind of reference frames."""
    conditions = {"t2v": 1, "i2v_head": 2, "i2v_loop": 1, "i2v_tail": 1}
    folder = tmp_path_factory.mktemp("student2")
    return train(host2_root, small_clips, folder, FIXED, condition_config=conditions, epochs=2, ckpt_every=4)


def test_train_makes_a_student(student: Trained) -> None:
    is_sound(student, steps=8)
    first, last = student.weights(0), student.weights()
    assert any(not torch.equal(first[name], last[name]) for name in last)
    assert all(torch.isfinite(value).all() for value in last.values())
    for checkpoint, steps in zip(student.checkpoints, (4, 8), strict=True):
        state, path = find_state(checkpoint / "model")
        assert path == checkpoint / "perflow.json" and state.steps == steps and state.draws["seed"] == 42
        assert state.windows == (1.0, 0.75, 0.5, 0.25, 0.0) and state.guidance["scale"] == SCALES
        assert state.transform == {"formula": "v2.0", "flow_shift": None}
    assert len({find_state(checkpoint)[0].teacher for checkpoint in student.checkpoints}) == 1


def test_a_resumed_run_goes_on(student: Trained, host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    """With the draws of the unbroken run and its teacher. The checkpoint is of an epoch's last step, which upstream cannot
    resume by itself (T53)."""
    checkpoint = student.checkpoints[0]
    options = ("--load", checkpoint, "--start_step", 0, "--start_epoch", 1)
    conditions = {"t2v": 1, "i2v_head": 2, "i2v_loop": 1, "i2v_tail": 1}
    run = train(host2_root, small_clips, tmp_path, FIXED, *options, condition_config=conditions, epochs=2, ckpt_every=4)
    assert "PeRFlow goes on after 4 training steps" in run.printed and "with its float32 masters" in run.printed
    ((*_,), whole), (rest,) = (student.draws[0][:4], student.draws[0][4:]), run.draws
    assert len(rest) == len(whole) == 4
    for one, other in zip(whole, rest, strict=True):
        for name in ("windows", "edges", "times", "noise"):
            assert torch.equal(one[name], other[name]), name
    before, after = find_state(checkpoint)[0], find_state(run.checkpoints[-1])[0]
    assert after.steps == 8 and after.teacher == before.teacher


def test_a_resumed_run_has_the_losses_of_the_whole_one(host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    """To the last bit: students start from noise, and a text-to-video run has nothing else that upstream draws."""
    whole = train(host2_root, small_clips, tmp_path / "whole", FIXED)
    rest = train(host2_root, small_clips, tmp_path / "rest", FIXED, "--load", whole.checkpoints[0])
    pairs = list(zip(whole.draws[0][2:], rest.draws[0], strict=True))
    assert len(pairs) == 2 and all(torch.equal(one["loss"], other["loss"]) for one, other in pairs)


def test_a_student_is_told_where_its_steps_end(host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    """Two steps in two processes, the second again after the checkpoint of the first, and a sample of two steps."""
    whole = train(host2_root, small_clips, tmp_path / "whole", TWO_TIME, nproc=2, ckpt_every=1)
    rest = train(host2_root, small_clips, tmp_path / "rest", TWO_TIME, "--load", whole.checkpoints[0], nproc=2, ckpt_every=1)
    is_sound(whole, steps=2)
    assert all(torch.equal(one[1]["loss"], other[0]["loss"]) for one, other in zip(whole.draws, rest.draws, strict=True))
    assert all(torch.equal(value, rest.weights()[name]) for name, value in whole.weights().items())
    said = sample(host2_root, tmp_path, whole.checkpoints[-1], {}, sampling_option={"num_steps": 2})
    assert "PeRFlow samples with 4 windows" in said and "cross edges" not in said


MATCHING = {**FIXED, "draws": {"shares": [2, 1, 1, 1]}, "matching": {"weight": 0.5, "rank": 4, "updates": 2}}


def matched(folder: Path, root: Path, clips: Clips, *options: object, **overrides: Any) -> tuple[Trained, list[list[str]]]:
    """Two steps in two processes, a checkpoint each; (the run, of each process its adapters after each step)."""
    imports = dict(imports=[*IMPORTS["imports"], "_matching_probe"])
    run = train(root, clips, folder, MATCHING, *options, nproc=2, ckpt_every=1, custom_imports=imports, **overrides)
    said = re.findall(r"adapters of process (\d): (\S+)", run.printed)
    return run, [[digest for rank, digest in said if rank == name] for name in "01"]


def test_matching_is_the_same_in_both_processes_and_resumed(
    host2_root: Path, small_clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in test_matching_scripts.py: two steps, the second again after the checkpoint of the first, to the last bit."""
    monkeypatch.setenv("PYTHONPATH", str(WORKERS))
    whole, said = matched(tmp_path / "whole", host2_root, small_clips)
    rest, again = matched(tmp_path / "rest", host2_root, small_clips, "--load", whole.checkpoints[0])
    is_sound(whole, steps=2)
    assert said[0] == said[1] and said[0][0] != said[0][1] and again == [said[0][1:]] * 2
    states = [read_state_dict(run.checkpoints[-1] / FILE_NAME) for run in (whole, rest)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any("exp_avg_sq" in name for name in states[0])
    assert all(torch.equal(value, rest.weights()[name]) for name, value in whole.weights().items())


def test_matching_of_lora_has_one_network(
    host2_root: Path, small_clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of the student and of the score on the same layers. `lora_checkpoint` goes on with both sets, in a new epoch."""
    monkeypatch.setenv("PYTHONPATH", str(WORKERS))
    whole, said = matched(tmp_path / "whole", host2_root, small_clips, lora_config=LORA)
    lora = str(whole.checkpoints[0] / "lora")
    rest, again = matched(tmp_path / "rest", host2_root, small_clips, lora_config=LORA, lora_checkpoint=lora)
    assert said[0] == said[1] and again[0] == again[1] and len({*said[0], *again[0]}) == 4
    assert "PeRFlow goes on after 1 training steps" in rest.printed and "new adapters" not in rest.printed
    state = read_state_dict(rest.checkpoints[-1] / FILE_NAME)
    steps = {int(value) for name, value in state.items() if name.endswith(".step")}
    assert steps == {(1 + 2) * 2} and not any("lora_" in name for name in state)
    first, last = (read_state_dict(next((run.checkpoints[-1] / "lora").glob("adapter_model.*"))) for run in (whole, rest))
    assert first.keys() == last.keys() and any(not torch.equal(first[name], last[name]) for name in first)


@needs_half
def test_float16_trains(host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    """ZeRO scales the loss; weights move, and stay finite."""
    scaled = {"reduce_bucket_size_in_m": 1, "overlap_allgather": False, "initial_scale": 2**8}
    run = train(host2_root, small_clips, tmp_path, FIXED, dtype="fp16", plugin_config=scaled)
    is_sound(run, steps=4)
    before, after = run.weights(0), run.weights()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_changed_windows_are_refused(student: Trained, host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    options = ("--load", student.checkpoints[0], "--start_step", 0, "--start_epoch", 1)
    perflow = {"windows": 2, "guidance": {"mode": "fixed", "scale": SCALES[:2]}}
    with pytest.raises(AssertionError, match=r"windows was \(1\.0, 0\.75.*, now \(1\.0, 0\.5, 0\.0\)"):
        train(host2_root, small_clips, tmp_path, perflow, *options, epochs=2)
    assert checkpoints(tmp_path / "outputs") == []


def test_a_student_is_no_teacher(student: Trained, host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    """Told before anything is built."""
    model = {"from_pretrained": str(student.checkpoints[-1])}
    with pytest.raises(AssertionError, match="were written by a PeRFlow run: they are a student's") as raised:
        train(host2_root, small_clips, tmp_path, FIXED, model=model)
    assert "Building models" not in str(raised.value)


def test_two_processes_draw_apart(host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    """T47: all ranks are seeded alike. Mode sync with dropped texts, EMA and two micro steps a step; the first one is
    left out, at which Open-Sora would save an optimizer that has no state."""
    dropout = {"t5": 0.3, "clip": 0.3}
    options = {"dropout_ratio": dropout, "accumulation_steps": 2, "start_step": 1, "ema_decay": 0.9, "epochs": 2}
    run = train(host2_root, small_clips, tmp_path, {}, nproc=2, **options)
    is_sound(run, steps=3)
    one, other = run.draws
    assert not any(torch.equal(a["times"], b["times"]) or torch.equal(a["noise"], b["noise"]) for a, b in zip(one, other))
    assert run.checkpoints[-1].name == "epoch1-global_step2"
    assert find_state(run.checkpoints[-1])[0].steps == 3


def test_different_settings_of_two_processes_are_refused(host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    config = train_config_v2(tmp_path / "train.py", small_clips, tmp_path / "outputs", **settings(FIXED))
    rank = "int(__import__('os').environ['RANK'])"
    config.write_text(config.read_text() + f"model['perflow']['flow_shift'] = 2.0 + {rank}\n")
    with pytest.raises(AssertionError, match="different settings, process 0 .*flow_shift is 2.0 there and 3.0 here"):
        run_script(host2_root, "diffusion/train.py", config, nproc=2, cwd=tmp_path)
    assert checkpoints(tmp_path / "outputs") == []


@pytest.fixture(scope="module")
def mixed_clips(small_clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Eight clips, and the first frame of each as a picture."""
    import cv2

    folder = tmp_path_factory.mktemp("mixed")
    lines = small_clips.csv.read_text().splitlines()
    for number, (video, caption) in enumerate(zip(small_clips.videos, small_clips.captions, strict=True)):
        cv2.imwrite(str(folder / f"{number}.png"), decode_video(video)[0])
        lines.append(f"{folder / f'{number}.png'},{caption},1,64,64,1.0,24")
    (folder / "mixed.csv").write_text("\n".join(lines) + "\n")
    return Clips(folder / "mixed.csv", small_clips.videos, small_clips.captions)


def test_hybrid_plugin_with_images_and_planned_windows(host2_root: Path, mixed_clips: Clips, tmp_path: Path) -> None:
    """DDP with static_graph clones the first answer (T58, T69), and without condition_config no cond comes (T59). Diffused
    starts, one time a solve; images are warped otherwise than videos (T64)."""
    plugin = {"tp_size": 1, "pp_size": 1, "sp_size": 1, "zero_stage": 2, "static_graph": True, "overlap_allgather": False}
    perflow = {"windows": [1.0, 0.6, 0.2, 0.0], "draws": {"starts": "diffused", "per_solve": 1, "grids": [4]}}
    perflow["guidance"] = {"mode": "fixed", "scale": 3.0}
    options = {"plugin": "hybrid", "plugin_config": {**plugin, "reduce_bucket_size_in_m": 1}, "condition_config": None}
    buckets = {"64px": {1: (1.0, 4), 9: (1.0, 2)}}
    run = train(host2_root, mixed_clips, tmp_path, perflow, bucket_config=buckets, **options)
    is_sound(run, steps=6)
    shapes = {tuple(draw["noise"].shape) for draw in run.draws[0]}
    assert shapes == {(4, 16, 1, 8, 8), (2, 16, 3, 8, 8)}
    for draw in run.draws[0]:
        assert draw["times"].shape[0] == 1
    warps = {round(edge, 6) for draw in run.draws[0] for edge in draw["edges"].flatten().tolist()}
    alphas = {frames: (1 + (16 - 256) * 2 / 3840) * frames**0.5 for frames in (1, 3)}
    known = {a * u / (1 + (a - 1) * u) for a in alphas.values() for u in (1.0, 0.6, 0.2, 0.0, 0.75, 0.5, 0.25)}
    assert all(min(abs(edge - other) for other in known) < 1e-5 for edge in warps)
    assert find_state(run.checkpoints[-1])[0].draws["grids"] == [4]


@pytest.fixture(scope="module")
def adapted(student: Trained, host2_root: Path, small_clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Adapters on random weights that are in a file, three times a solve: the teacher is the network without them."""
    folder = tmp_path_factory.mktemp("lora2")
    perflow = {**FIXED, "draws": {"per_solve": 3}}
    model = {"from_pretrained": str(student.outputs.parent / "teacher.safetensors")}
    return train(host2_root, small_clips, folder, perflow, model=model, lora_config=LORA)


def test_lora_is_taught_by_the_network_without_it(adapted: Trained, student: Trained) -> None:
    is_sound(adapted, steps=4)
    assert all(draw["times"].shape == (3, 2) for draw in adapted.draws[0])
    checkpoint = adapted.checkpoints[-1]
    assert {file.name for file in checkpoint.iterdir()} >= {"perflow.json", "lora"}
    state, path = find_state(checkpoint / "lora")
    assert path == checkpoint / "perflow.json" and state.steps == 4
    assert state.teacher == find_state(student.checkpoints[0])[0].teacher
    one = load_file(adapted.outputs.parent / "teacher.safetensors")
    other = load_file(student.outputs.parent / "teacher.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_lora_goes_on_from_its_adapters(
    adapted: Trained, student: Trained, host2_root: Path, small_clips: Clips, tmp_path: Path
):
    """Upstream's --load knows no adapters; lora_checkpoint does."""
    model = {"from_pretrained": str(student.outputs.parent / "teacher.safetensors")}
    options = {"model": model, "lora_config": LORA, "lora_checkpoint": str(adapted.checkpoints[-1] / "lora")}
    run = train(host2_root, small_clips, tmp_path, {**FIXED, "draws": {"per_solve": 3}}, **options)
    assert "PeRFlow goes on after 4 training steps" in run.printed and "with its float32 masters" in run.printed
    assert find_state(run.checkpoints[-1])[0].steps == 8
    assert not torch.equal(run.draws[0][0]["noise"], adapted.draws[0][0]["noise"])


def test_mode_range_trains_the_embedding_of_scales(host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    """guidance_embed is new in the network, and its first weights change nothing; a sampler that is not told of the mode builds
    it as well. ZeRO-1, two micro steps without a reduction, and the loss by upstream's get_batch_loss."""
    perflow = {"guidance": {"mode": "range", "scale": [2.0, 8.0]}}
    options = {"plugin": "zero1", "accumulation_steps": 2, "start_step": 1, "no_i2v_ref_loss": True}
    run = train(host2_root, small_clips, tmp_path, perflow, epochs=2, **options)
    is_sound(run, steps=7)
    teacher = load_file(tmp_path / "teacher.safetensors")
    assert not teacher["guidance_in.out_layer.weight"].any() and not teacher["guidance_in.out_layer.bias"].any()
    assert run.weights()["guidance_in.out_layer.weight"].any()
    printed = sample(host2_root, tmp_path, run.checkpoints[-1], {})
    assert "guidance mode range" in printed and "Unexpected keys" not in printed and "WARNING" not in printed


def test_text_to_video(student: Trained, host2_root: Path, tmp_path: Path) -> None:
    printed = sample(host2_root, tmp_path, student.checkpoints[-1], {})
    assert printed.count("PeRFlow samples with 4 windows and guidance mode fixed") == 1
    assert "WARNING" not in printed


def test_image_to_video_with_other_windows_warns_once(student: Trained, host2_root: Path, small_clips: Clips, tmp_path: Path):
    """Two videos from one process: the sentence comes once."""
    options = {"cond_type": "i2v_head", "ref": str(small_clips.videos[0])}
    printed = sample(host2_root, tmp_path, student.checkpoints[-1], {"windows": 2}, **options)
    assert printed.count("windows trained (1.0, 0.75, 0.5, 0.25, 0.0), asked (1.0, 0.5, 0.0)") == 1


def test_distill_and_lora(adapted: Trained, student: Trained, host2_root: Path, tmp_path: Path) -> None:
    """The settings come from beside the adapters; upstream's `distill` passes no cond, which the network wants (T60)."""
    base = student.outputs.parent / "teacher.safetensors"
    options = {"pretrained_lora_path": str(adapted.checkpoints[-1] / "lora"), "sampling_option": {"method": "distill"}}
    printed = sample(host2_root, tmp_path, base, {}, **options)
    assert printed.count("PeRFlow samples with 4 windows and guidance mode fixed") == 1
    assert str(adapted.checkpoints[-1] / "perflow.json") in printed


def test_the_state_is_json_that_a_person_reads(student: Trained) -> None:
    state = json.loads((student.checkpoints[-1] / "perflow.json").read_text())
    assert state["objective"] == "perflow" and state["path"] == "linear" and state["prediction"] == "velocity"
    assert TINY_FLUX["type"] == "flux"  # the harness's own was not changed
