"""The average of the weights (EMA) in Open-Sora 2.0's unmodified train.py, and its export through inference.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from _harness import Clips, run_python
from safetensors.torch import load_file
from test_v2_perflow import FIXED, LORA, Trained, sample, train
from torch import Tensor

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.training.state import find_state

pytestmark = pytest.mark.host
DECAY = 0.75


def masters(checkpoint: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """What ZeRO trains, put together from the shards of two processes."""
    shards = [load_file(checkpoint / "perflow_masters" / f"rank-{rank}-of-2.safetensors") for rank in (0, 1)]
    return {name: torch.cat([shard[name] for shard in shards])[: shape.numel()].view(shape) for name, shape in shapes.items()}


def is_followed(checkpoints: list[Path], named: dict[str, str]) -> None:
    """Each average is the one before it, moved by 1 - DECAY of the way to the masters; float32 rounds each of three terms."""
    averages = [load_file(checkpoint / "ema.safetensors") for checkpoint in checkpoints]
    for checkpoint, before, after in zip(checkpoints[1:], averages, averages[1:]):
        now = masters(checkpoint, {name: after[saved].shape for name, saved in named.items()})
        for name, saved in named.items():
            expected = DECAY * before[saved].double() + (1 - DECAY) * now[name].double()
            torch.testing.assert_close(after[saved].double(), expected, rtol=1e-6, atol=1e-7)
        assert any(not torch.equal(before[saved], after[saved]) for saved in named.values())


def exported(checkpoint: Path, out: Path) -> Path:
    command = ["-m", "opensora_perflow", "export", str(checkpoint), "--out", str(out)]
    run_python(command, nproc=1, log=out.with_suffix(".log"), cwd=out.parent)
    return out


@pytest.fixture(scope="module")
def whole(host2_root: Path, small_clips: Clips, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("average")
    return train(host2_root, small_clips, folder, FIXED, nproc=2, ckpt_every=1, epochs=2, ema_decay=DECAY)


def test_the_average_of_all_weights_moves_and_is_whole(whole: Trained) -> None:
    names = load_file(whole.checkpoints[0] / "perflow_masters" / "rank-0-of-2.safetensors")
    is_followed(whole.checkpoints, {name: name for name in names})


def test_an_export_is_sampled_and_trained_on_from(whole: Trained, host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    last = whole.checkpoints[-1]
    student = exported(last, tmp_path / "student")
    written, average = load_file(student / "model" / "model.safetensors"), load_file(last / "ema.safetensors")
    assert written.keys() == average.keys() and all(torch.equal(written[name], average[name]) for name in written)
    printed = sample(host2_root, tmp_path, student, {})
    assert "PeRFlow samples with 4 windows" in printed and "missing keys" not in printed and "unexpected" not in printed
    options = {"model": {"from_pretrained": str(student)}, "ema_decay": None}
    perflow = {**FIXED, "teacher": {"from_pretrained": str(whole.outputs.parent / "teacher.safetensors")}}
    later = train(host2_root, small_clips, tmp_path / "later", perflow, **options)
    assert find_state(later.checkpoints[-1])[0].teacher == find_state(last)[0].teacher


def test_the_average_is_resumed(whole: Trained, host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    """Upstream's own loader takes the file; the rest of the run is followed from there."""
    first = whole.checkpoints[0]
    options = ("--load", first)
    again = train(host2_root, small_clips, tmp_path, FIXED, *options, nproc=2, ckpt_every=1, epochs=2, ema_decay=DECAY)
    names = load_file(first / "perflow_masters" / "rank-0-of-2.safetensors")
    is_followed([first, *again.checkpoints], {name: name for name in names})


def test_adapters_have_an_average(host2_root: Path, small_clips: Clips, tmp_path: Path) -> None:
    """Upstream keeps none; `lora_checkpoint` goes on from it."""
    options = {"lora_config": LORA, "nproc": 2, "ckpt_every": 1, "ema_decay": DECAY}
    run = train(host2_root, small_clips, tmp_path / "one", FIXED, epochs=2, **options)
    last = run.checkpoints[-1]
    adapters = read_state_dict(next((last / "lora").glob("adapter_model.*")))
    names = load_file(last / "perflow_masters" / "rank-0-of-2.safetensors")
    named = {name: f"base_model.model.{name.replace('.default.', '.')}" for name in names}
    assert set(named.values()) == set(adapters) == set(load_file(last / "ema.safetensors"))
    is_followed(run.checkpoints, named)
    student = exported(last, tmp_path / "student")
    written, average = load_file(student / "lora" / "adapter_model.safetensors"), load_file(last / "ema.safetensors")
    assert written.keys() == average.keys() and all(torch.equal(written[name], average[name]) for name in written)
    shutil.copy(tmp_path / "one" / "teacher.safetensors", tmp_path / "base.safetensors")
    lora = {"pretrained_lora_path": str(student / "lora")}
    assert "PeRFlow samples with 4 windows" in sample(host2_root, tmp_path, tmp_path / "base.safetensors", {}, **lora)
    model = {"from_pretrained": str(tmp_path / "base.safetensors")}
    again = train(host2_root, small_clips, tmp_path / "two", FIXED, model=model, lora_checkpoint=str(last / "lora"), **options)
    is_followed([last, *again.checkpoints], named)
