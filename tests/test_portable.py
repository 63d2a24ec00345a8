"""Adaptations of opensora_perflow.portable, with fakes in place of Open-Sora and ColossalAI."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_perflow import portable
from opensora_perflow.portable import (
    adam,
    async_writer,
    cached_download,
    compilation,
    cpu_accelerator,
    cuda_broadcasts,
    cuda_queue,
    device_default,
    device_setup,
    flash_attention,
    liger_kernels,
    mp4_codec,
    pinned_memory,
    process_group,
    pyav_error,
    script_assert,
    text_dropout,
    world_of_one,
    xformers_attention,
    zero_optimizer,
    zero_stores,
)
from opensora_perflow.portable.imports import ModuleView, is_installed, source_mentions, when_imported
from opensora_perflow.portable.xformers_attention import BlockDiagonalMask, memory_efficient_attention

FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}  # sums of a few dozen float64 products

STAND_INS = (
    *("xformers", "xformers.ops", "xformers.ops.fmha"),
    *("flash_attn", "flash_attn.flash_attn_interface"),
    *("liger_kernel", "liger_kernel.ops", "liger_kernel.ops.rms_norm", "liger_kernel.ops.rope"),
    *("tensornvme", "tensornvme.async_file_io"),
)
"""Modules that adaptations provide where the packages are not installed."""


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test lets an adaptation change in torch or in the import system is undone after it."""
    for owner, name in [
        (torch.cuda, "is_available"),
        (torch.cuda, "device_count"),
        (torch.cuda, "synchronize"),
        (torch.cuda, "set_device"),
        (dist, "init_process_group"),
    ]:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in STAND_INS:
        monkeypatch.setitem(sys.modules, name, None)  # registers the undo
        del sys.modules[name]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(portable, "_active", {})


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Writer of fake packages: packages(name, {"relative/path.py": source}) makes one importable."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def forget(name: str) -> None:
        for module in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)

    written = []

    def write(name: str, files: dict[str, str]) -> None:
        forget(name)
        written.append(name)
        for relative, source in {"__init__.py": "", **files}.items():
            path = tmp_path / name / relative
            for folder in [path.parent, *path.parent.parents]:
                if folder == tmp_path:
                    break
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "__init__.py").touch()
            path.write_text(source)

    yield write
    for name in written:
        for module in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[module]


def absent(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make `import name` fail, as where it is not installed."""
    monkeypatch.setitem(sys.modules, name, None)


# Attention


def random_qkv(m_query: int, m_key: int, batch: int = 1, heads: int = 3, k: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, m_query, heads, k), (batch, m_key, heads, k), (batch, m_key, heads, k)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The definition, on [B, M, H, K]."""
    scores = torch.einsum("bmhk,bnhk->bhmn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    return torch.einsum("bhmn,bnhk->bmhk", scores.softmax(-1), v)


def block_bias(q_lengths: list[int], kv_lengths: list[int]) -> Tensor:
    """0 inside the blocks, -inf outside, filled in by hand."""
    bias = torch.full((sum(q_lengths), sum(kv_lengths)), float("-inf"), dtype=torch.float64)
    row = column = 0
    for rows, columns in zip(q_lengths, kv_lengths, strict=True):
        bias[row : row + rows, column : column + columns] = 0.0
        row, column = row + rows, column + columns
    return bias


@pytest.mark.parametrize(
    ("q_lengths", "kv_lengths"),
    [([5], [3]), ([4, 4], [2, 7]), ([6, 1, 3], [1, 5, 2]), ([3, 0, 2], [2, 4, 1])],
)
def test_block_diagonal_attention_is_dense_attention_with_the_mask(q_lengths: list[int], kv_lengths: list[int]) -> None:
    q, k, v = random_qkv(sum(q_lengths), sum(kv_lengths))
    mask = BlockDiagonalMask.from_seqlens(q_lengths, kv_lengths)
    out = memory_efficient_attention(q, k, v, attn_bias=mask)
    expected = dense_attention(q, k, v, block_bias(q_lengths, kv_lengths))
    torch.testing.assert_close(out, expected, **FLOAT64)
    assert out.is_contiguous() and out.shape == q.shape

    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((out * weights).sum(), [q, k, v])
    expected_gradients = torch.autograd.grad((expected * weights).sum(), [q, k, v])
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, **FLOAT64)


def test_block_diagonal_mask_of_one_list_and_as_a_tensor() -> None:
    q, k, v = random_qkv(7, 7)
    mask = BlockDiagonalMask.from_seqlens([2, 5])
    assert mask.kv_lengths == (2, 5)
    torch.testing.assert_close(
        memory_efficient_attention(q, k, v, mask), dense_attention(q, k, v, block_bias([2, 5], [2, 5])), **FLOAT64
    )
    dense = mask.materialize((1, 3, 7, 7), dtype=torch.float64)
    assert dense.shape == (1, 3, 7, 7)
    assert torch.equal(dense[0, 1], block_bias([2, 5], [2, 5]))
    torch.testing.assert_close(memory_efficient_attention(q, k, v, dense), memory_efficient_attention(q, k, v, mask), **FLOAT64)


def test_a_sequence_without_keys_gives_zeros() -> None:
    q, k, v = random_qkv(5, 4)
    out = memory_efficient_attention(q, k, v, BlockDiagonalMask.from_seqlens([2, 3], [0, 4]))
    assert torch.equal(out[:, :2], torch.zeros(1, 2, 3, 4, dtype=torch.float64))
    torch.testing.assert_close(out[:, 2:], dense_attention(q[:, 2:], k, v), **FLOAT64)


def test_attention_without_mask_with_scale_and_bias() -> None:
    q, k, v = random_qkv(5, 6, batch=2)
    torch.testing.assert_close(memory_efficient_attention(q, k, v), dense_attention(q, k, v), **FLOAT64)
    out = memory_efficient_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(out, dense_attention(q, k, v, scale=0.3), **FLOAT64)
    bias = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(memory_efficient_attention(q, k, v, bias), dense_attention(q, k, v, bias), **FLOAT64)
    assert memory_efficient_attention(q, k, v).is_contiguous()


def test_attention_dropout_is_applied() -> None:
    q, k, v = (tensor.float() for tensor in random_qkv(4, 4))
    torch.manual_seed(0)
    dropped = memory_efficient_attention(q, k, v, p=0.5)
    assert not torch.allclose(dropped, memory_efficient_attention(q, k, v))


def test_wrong_lengths_and_shapes_are_refused() -> None:
    q, k, v = random_qkv(6, 5)
    with pytest.raises(ValueError, match=r"6 query tokens for lengths \[2, 3\] \(sum 5\)"):
        memory_efficient_attention(q, k, v, BlockDiagonalMask.from_seqlens([2, 3], [2, 3]))
    with pytest.raises(ValueError, match=r"5 key tokens for lengths \[2, 2\] \(sum 4\)"):
        memory_efficient_attention(q, k, v, BlockDiagonalMask.from_seqlens([3, 3], [2, 2]))
    with pytest.raises(ValueError, match="got batch 2"):
        memory_efficient_attention(*random_qkv(6, 5, batch=2), BlockDiagonalMask.from_seqlens([3, 3], [2, 3]))
    with pytest.raises(ValueError, match=r"got 2 lengths \[3, 3\] and 1 lengths \[5\]"):
        BlockDiagonalMask.from_seqlens([3, 3], [5])
    with pytest.raises(ValueError, match=r"lengths >= 0, got \[3, -1\]"):
        BlockDiagonalMask.from_seqlens([3, -1])
    with pytest.raises(ValueError, match=r"lengths >= 0, got \[\]"):
        BlockDiagonalMask.from_seqlens([])
    with pytest.raises(ValueError, match=r"got \[1, 6, 12\]"):
        memory_efficient_attention(q.flatten(2), k.flatten(2), v.flatten(2))
    with pytest.raises(TypeError, match="got str"):
        memory_efficient_attention(q, k, v, "causal")


def test_xformers_can_be_imported_and_found(monkeypatch: pytest.MonkeyPatch, no_cuda: None) -> None:
    assert xformers_attention.install()
    import xformers.ops

    assert xformers.ops.memory_efficient_attention is memory_efficient_attention
    assert xformers.ops.fmha.BlockDiagonalMask is BlockDiagonalMask
    assert find_spec("xformers") is not None and find_spec("xformers.ops") is not None


def test_real_xformers_is_kept_on_cuda(monkeypatch: pytest.MonkeyPatch, cuda: None) -> None:
    real = ModuleType("xformers")
    monkeypatch.setitem(sys.modules, "xformers", real)
    assert not xformers_attention.install()
    assert sys.modules["xformers"] is real


# All of them

VERSION_1 = {
    "utils/train_utils.py": "optimizer._param_store",
    "models/layers/blocks.py": "torch.rand(1).cuda()",
    "schedulers/iddpm/gaussian_diffusion.py": 'device: str = "cuda"',
    "datasets/utils.py": '"avc1"',
}
VERSION_2 = {
    "models/mmdit/math.py": "from flash_attn import flash_attn_func",
    "models/mmdit/layers.py": "from liger_kernel.ops.rms_norm import LigerRMSNormFunction\n@torch.compile(dynamic=True)",
    "utils/ckpt.py": "from tensornvme.async_file_io import AsyncFileWriter\ntorch.empty(1, pin_memory=True)",
    "utils/train.py": "    assert torch.cuda.is_available()",
    "utils/config.py": "def sync_string(value)",
    "utils/cai.py": "def init_inference_environment()",
}
"""What adaptations look for in the two generations of Open-Sora."""
ONLY_2 = (
    async_writer,
    compilation,
    cuda_broadcasts,
    device_setup,
    flash_attention,
    liger_kernels,
    pinned_memory,
    world_of_one,
)


def test_nothing_is_replaced_on_a_complete_machine(
    monkeypatch: pytest.MonkeyPatch, cuda: None, packages, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("xformers", "flash_attn", "liger_kernel", "tensornvme"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(AVError=OSError, __version__="13"))
    monkeypatch.setattr(mp4_codec, "can_encode", lambda code: True)
    packages("cv2", {})
    packages("huggingface_hub", {"__init__.py": "def cached_download(): ..."})
    packages("diffusers", {"utils/dynamic_modules_utils.py": "from huggingface_hub import cached_download"})
    packages("colossalai", {"zero/low_level/low_level_optim.py": "self._param_store = None"})
    packages("opensora", {**VERSION_1, **VERSION_2})
    before = copy.copy(sys.meta_path), dict(vars(torch.cuda)), dict(vars(dist))
    with caplog.at_level(logging.DEBUG, logger="opensora_perflow"):
        assert portable.activate() == []
    assert (sys.meta_path, dict(vars(torch.cuda)), dict(vars(dist))) == before
    assert caplog.records == []


def test_each_adaptation_is_installed_once_and_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, no_cuda: None, packages, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(FFmpegError=OSError, __version__="14"))
    monkeypatch.setattr(mp4_codec, "can_encode", lambda code: code == "mp4v")
    packages("cv2", {})
    packages("huggingface_hub", {})
    packages("diffusers", {"utils/dynamic_modules_utils.py": "from huggingface_hub import cached_download"})
    packages("colossalai", {"zero/low_level/low_level_optim.py": ""})
    packages("opensora", {**VERSION_1, **VERSION_2})
    with caplog.at_level(logging.INFO, logger="opensora_perflow.portable"):
        active = portable.activate()
        assert portable.activate() == active
    assert active == list(portable.INSTALLERS)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == [f"portable {name}" for name in active]
    assert all("because" in line or "which needs" in line for line in lines)


def test_packages_that_are_not_there_need_nothing(monkeypatch: pytest.MonkeyPatch, no_cuda: None) -> None:
    for name in ("opensora", "colossalai", "huggingface_hub", "diffusers", "cv2", "av"):
        absent(monkeypatch, name)
    for module in (adam, cached_download, cpu_accelerator, device_default, zero_stores, mp4_codec, pyav_error):
        assert not module.install()
    assert not text_dropout.install() and not zero_optimizer.install()


def test_open_sora_1_is_left_alone_by_what_2_needs(no_cuda: None, packages) -> None:
    packages("opensora", VERSION_1)
    assert [module.NAME for module in ONLY_2 if module.install()] == []


# Looking and hooking


def test_when_imported_changes_a_module_before_anyone_sees_it(packages, monkeypatch: pytest.MonkeyPatch) -> None:
    packages("fakehost", {"inner.py": "value = 1\ndef get(): return value\n"})
    seen = []

    def change(module: ModuleType) -> None:
        seen.append(module.__name__)
        module.value = 2

    finders = list(sys.meta_path)
    when_imported("fakehost.inner", change)
    assert "fakehost" not in sys.modules  # armed, not imported
    from fakehost.inner import get, value

    assert (value, get(), seen) == (2, 2, ["fakehost.inner"])
    assert sys.meta_path == finders
    loader = sys.modules["fakehost.inner"].__spec__.loader
    assert type(loader).__name__ == "SourceFileLoader" and sys.modules["fakehost.inner"].__loader__ is loader
    when_imported("fakehost.inner", change)  # imported already: at once
    assert seen == ["fakehost.inner"] * 2


def test_when_imported_leaves_a_missing_module_missing(packages) -> None:
    packages("fakehost", {})
    when_imported("fakehost.absent", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="fakehost.absent"):
        import fakehost.absent  # noqa: F401


def test_module_view_replaces_for_one_importer_only() -> None:
    view = ModuleView(dist, all_reduce="mine")
    assert view.all_reduce == "mine" and dist.all_reduce != "mine"
    assert view.is_available is dist.is_available
    with pytest.raises(AttributeError):
        view.no_such_name  # noqa: B018


def test_source_is_asked_without_importing(packages, monkeypatch: pytest.MonkeyPatch) -> None:
    packages("fakehost", {"inner.py": "raise RuntimeError('imported')  # token"})
    assert source_mentions("fakehost", "inner.py", "token")
    assert not source_mentions("fakehost", "inner.py", "other")
    assert not source_mentions("fakehost", "nothing.py", "token")
    absent(monkeypatch, "fakeabsent")
    assert not source_mentions("fakeabsent", "inner.py", "token") and not is_installed("fakeabsent")


# One by one


def test_only_the_scripts_own_assert_sees_cuda(no_cuda: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fakelibrary.py").write_text("import torch\ndef ask():\n    assert not torch.cuda.is_available()\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, fakelibrary\n"
        "def main():\n"
        '    assert torch.cuda.is_available(), "Training currently requires at least one GPU."\n'
        '    device = "cuda" if torch.cuda.is_available() else "cpu"\n'
        "    count = torch.cuda.device_count()\n"
        "    torch.cuda.set_device(3 % torch.cuda.device_count())\n"
        "    fakelibrary.ask()\n"
        "    return device, count\n"
        "result = main()\n"
    )
    assert script_assert.install() and cuda_queue.install()
    assert runpy.run_path(str(script), run_name="__main__")["result"] == ("cpu", 0)
    with pytest.raises(AssertionError, match="at least one GPU"):
        runpy.run_path(str(script), run_name="imported")
    assert not torch.cuda.is_available()


def test_cuda_queue_does_nothing_quietly(no_cuda: None) -> None:
    assert cuda_queue.install()
    assert torch.cuda.synchronize() is None and torch.cuda.synchronize("cpu") is None
    assert torch.cuda.set_device(0) is None


def test_world_of_one_only_where_a_group_is_asked_for(no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: calls.append((args, options)))
    assert process_group.install()
    assert "WORLD_SIZE" not in os.environ
    dist.init_process_group(backend="nccl", init_method="tcp://127.0.0.1:1", rank=0, world_size=1)
    assert "WORLD_SIZE" not in os.environ
    dist.init_process_group(backend="nccl", timeout=5)
    assert calls == [
        (("gloo", "tcp://127.0.0.1:1"), {"rank": 0, "world_size": 1}),
        (("gloo", None), {"timeout": 5}),
    ]
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert 0 < int(os.environ["MASTER_PORT"]) < 65536


def test_torchruns_environment_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "9"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    process_group.provide_world_of_one()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_PORT"]) == ("1", "2", "9")


def test_launch_from_torch_gets_a_world_of_one(no_cuda: None, packages, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(
        "colossalai",
        {
            "initialize.py": "import os\ndef launch_from_torch(config): return config, os.environ['WORLD_SIZE']\n",
            "__init__.py": "from .initialize import launch_from_torch\n",
        },
    )
    assert process_group.install()
    import colossalai

    assert colossalai.launch_from_torch({}) == ({}, "1")


def test_hybrid_adam_takes_the_same_steps_as_adamw() -> None:
    start = torch.randn(5, generator=torch.Generator().manual_seed(0))
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = adam.HybridAdam([ours], adamw_mode=True, **options)
    reference = torch.optim.AdamW([theirs], **options)
    for step in range(5):
        for parameter, stepper in [(ours, optimizer), (theirs, reference)]:
            stepper.zero_grad()
            (parameter**2 * (step + 1)).sum().backward()
            stepper.step()
    assert torch.equal(ours, theirs) and not torch.equal(ours, start)


@pytest.mark.parametrize(
    "option",
    [{"bias_correction": False}, {"adamw_mode": False, "weight_decay": 0.1}, {"nvme_offload_fraction": 0.5}],
)
def test_hybrid_adam_refuses_what_adamw_does_not_do(option: dict) -> None:
    with pytest.raises(ValueError, match="drop the argument or run on CUDA"):
        adam.HybridAdam([nn.Parameter(torch.zeros(1))], **option)
    adam.HybridAdam([nn.Parameter(torch.zeros(1))], adamw_mode=False)  # without decay the two modes are one


def test_hybrid_adam_is_replaced_where_the_script_imports_it(no_cuda: None, packages) -> None:
    packages("colossalai", {"nn/optimizer.py": "class HybridAdam: ..."})
    assert adam.install()
    from colossalai.nn.optimizer import HybridAdam

    assert HybridAdam is adam.HybridAdam


def test_the_zero_optimizers_stores_have_their_old_names_again(packages) -> None:
    packages("opensora", {"utils/train_utils.py": "optimizer._param_store.working_to_master_param"})
    packages(
        "colossalai",
        {
            "zero/low_level/low_level_optim.py": "class LowLevelZeroOptimizer:\n"
            "    pg_to_grad_store, pg_to_bucket_store = {'group': 'grads'}, {'group': 'bucket'}\n"
            "    def get_working_to_master_map(self): return {7: 'master'}\n"
        },
    )
    assert zero_stores.install()
    from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

    optimizer = LowLevelZeroOptimizer()
    assert optimizer._param_store.working_to_master_param[7] == "master"
    assert optimizer._grad_store == "grads" and optimizer._bucket_store == "bucket"
    optimizer.pg_to_grad_store = {"group": "grads", "experts": "others"}
    with pytest.raises(ValueError, match="too many values"):
        assert optimizer._grad_store


def test_a_host_that_asks_the_new_way_needs_no_old_names(packages) -> None:
    packages("opensora", {"utils/train_utils.py": "optimizer.get_working_to_master_map()"})
    packages("colossalai", {"zero/low_level/low_level_optim.py": ""})
    assert not zero_stores.install()


TOKEN_DROP = """
import torch
class CaptionEmbedder:
    def token_drop(self, caption, uncond_prob=0.5):
        drop = torch.rand(caption.shape[0]).cuda() < uncond_prob
        return torch.where(drop, torch.zeros_like(caption), caption)
class Unrelated:
    def other(self): return torch.zeros(1).cuda()
"""


def test_text_dropout_stays_on_the_cpu_and_draws_the_same(no_cuda: None, packages, monkeypatch) -> None:
    packages("opensora", {"models/layers/blocks.py": TOKEN_DROP})
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: pytest.fail("moved to CUDA"))
    assert text_dropout.install()
    from opensora.models.layers.blocks import CaptionEmbedder, Unrelated

    torch.manual_seed(3)
    dropped = CaptionEmbedder().token_drop(torch.ones(64), uncond_prob=0.25)
    torch.manual_seed(3)
    assert torch.equal(dropped == 0, torch.rand(64) < 0.25)
    with pytest.raises(pytest.fail.Exception, match="moved to CUDA"):
        Unrelated().other()


@pytest.mark.parametrize("signature", ['self, *, betas, device="cuda"', 'self, betas, device="cuda"'])
def test_default_device_follows_the_machine(no_cuda: None, packages, signature: str) -> None:
    source = f'# device: str = "cuda"\nclass GaussianDiffusion:\n    def __init__({signature}): self.device = device\n'
    packages("opensora", {"schedulers/iddpm/gaussian_diffusion.py": source})
    assert device_default.install()
    from opensora.schedulers.iddpm.gaussian_diffusion import GaussianDiffusion

    assert GaussianDiffusion(betas=1).device == "cpu"
    assert GaussianDiffusion(betas=1, device="meta").device == "meta"


def test_mp4v_is_asked_for_in_the_hosts_writer_alone(packages, monkeypatch: pytest.MonkeyPatch) -> None:
    cv2_source = "def VideoWriter_fourcc(*letters): return ''.join(letters)\nVideoWriter = 'writer'\n"
    host_source = 'def fourcc(code="avc1"): return cv2.VideoWriter_fourcc(*code), cv2.VideoWriter\n'
    packages("cv2", {"__init__.py": cv2_source})
    packages("opensora", {"datasets/utils.py": "import cv2\n" + host_source})
    monkeypatch.setattr(mp4_codec, "can_encode", lambda code: code == "mp4v")
    assert mp4_codec.install()
    import cv2
    from opensora.datasets.utils import fourcc

    assert fourcc() == ("mp4v", "writer") and fourcc("XVID") == ("XVID", "writer")
    assert cv2.VideoWriter_fourcc(*"avc1") == "avc1"


def test_pyav_error_gets_its_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import av

    monkeypatch.delattr(av, "AVError", raising=False)
    assert pyav_error.install()
    assert av.AVError is av.FFmpegError
    assert not pyav_error.install()
    del av.AVError


def test_cached_download_can_be_imported_and_says_what_to_install(packages) -> None:
    packages("huggingface_hub", {})
    packages("diffusers", {"utils/dynamic_modules_utils.py": "from huggingface_hub import cached_download"})
    assert cached_download.install()
    from huggingface_hub import cached_download as imported

    with pytest.raises(RuntimeError, match="huggingface_hub<0.26"):
        imported("url")


ACCELERATOR = """
import torch
class CpuAccelerator:
    name = "cpu"
    def Stream(self): raise RuntimeError("not supported")
    current_stream = default_stream = stream = synchronize = Stream
    def get_current_device(self): return "cpu"
    def get_rng_state(self, device=None): return torch.get_rng_state(device)
    def manual_seed(self, seed): raise RuntimeError("not supported")
_current = CpuAccelerator()
def get_accelerator(): return _current
def set_accelerator(accelerator):
    global _current
    _current = accelerator
"""


def test_cpu_accelerator_gets_streams(no_cuda: None, packages) -> None:
    packages("colossalai", {"accelerator/__init__.py": ACCELERATOR})
    assert cpu_accelerator.install()
    from colossalai.accelerator import CpuAccelerator, get_accelerator

    accelerator = get_accelerator()
    assert isinstance(accelerator, CpuAccelerator) and accelerator.get_current_device() == "cpu"
    accelerator.Stream().wait_stream(accelerator.current_stream())
    with accelerator.stream(accelerator.default_stream()):
        accelerator.synchronize()
    assert accelerator.device_count() == 1  # float16's loss scaler asks


def test_cpu_accelerator_seeds_torchs_generator(no_cuda: None, packages) -> None:
    packages("colossalai", {"accelerator/__init__.py": ACCELERATOR})
    assert cpu_accelerator.install()
    from colossalai.accelerator import get_accelerator

    get_accelerator().manual_seed(3)
    assert torch.equal(get_accelerator().get_rng_state(), torch.Generator().manual_seed(3).get_state())


ZERO = """
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
class LowLevelZeroOptimizer:
    def __init__(self, dtypes, overlap_communication=True):
        self.dtypes, self.overlap = dtypes, overlap_communication
        self._sanity_checks()
    def _sanity_checks(self):
        assert get_accelerator().name in ["cuda", "npu"], "device is required"
        assert len(set(self.dtypes)) == 1, "one dtype"
"""


def test_zero_optimizer_accepts_a_cpu_but_not_mixed_dtypes(no_cuda: None, packages) -> None:
    packages("colossalai", {"accelerator/__init__.py": ACCELERATOR, "zero/low_level/low_level_optim.py": ZERO})
    assert zero_optimizer.install()
    from colossalai.zero.low_level import low_level_optim

    optimizer = low_level_optim.LowLevelZeroOptimizer(["bf16"], overlap_communication=True)
    assert not optimizer.overlap
    assert low_level_optim.get_accelerator().name == "cpu"
    with pytest.raises(AssertionError, match="one dtype"):
        low_level_optim.LowLevelZeroOptimizer(["bf16", "fp32"])
    assert low_level_optim.get_accelerator().name == "cpu"
    has_it = zero_optimizer.gloo_has_reduce_scatter()
    assert (low_level_optim.dist.reduce_scatter is dist.reduce_scatter) == has_it
    assert low_level_optim.dist.all_reduce is dist.all_reduce


def test_reduce_scatter_sums_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([3.0, 4.0]).bfloat16()]
    theirs = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op, group: tensor.add_(theirs))
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    output = torch.zeros(2).bfloat16()
    zero_optimizer.reduce_scatter(output, mine)
    assert torch.equal(output, torch.tensor([33.0, 44.0]).bfloat16())
    assert torch.equal(mine[1], torch.tensor([3.0, 4.0]).bfloat16())  # inputs are left as they were


# Open-Sora 2.0


def test_flash_attention_is_attention(no_cuda: None, packages) -> None:
    packages("opensora", VERSION_2)
    assert flash_attention.install()
    from flash_attn import flash_attn_func
    from flash_attn.flash_attn_interface import _flash_attn_forward

    q, k, v = random_qkv(5, 6, batch=2)
    torch.testing.assert_close(flash_attn_func(q, k, v), dense_attention(q, k, v), **FLOAT64)
    with pytest.raises(RuntimeError, match="set sp_size=1"):
        _flash_attn_forward(q, k, v)


@pytest.mark.parametrize("module", [flash_attention, liger_kernels])
def test_an_installed_kernel_is_replaced_without_cuda_alone(monkeypatch, packages, cuda: None, module: ModuleType) -> None:
    packages("opensora", VERSION_2)
    name = "flash_attn" if module is flash_attention else "liger_kernel"
    real = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, real)
    assert not module.install() and sys.modules[name] is real
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.install() and sys.modules[name] is not real


def test_rms_norm_rounds_before_the_scale(no_cuda: None, packages) -> None:
    packages("opensora", VERSION_2)
    assert liger_kernels.install()
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([2.0, 0.5])
    # The mean square of (3, 4) is 12.5, and eps makes it 16.
    expected = torch.tensor([[3 / 4 * 3.0, 4 / 4 * 1.5], [0.0, 0.0]])
    assert torch.equal(LigerRMSNormFunction.apply(x, weight, 3.5, 1.0, "llama", False), expected)
    half = LigerRMSNormFunction.apply(x.bfloat16(), weight.bfloat16(), 1e-6, 0.0, "llama", False)
    rounded = torch.tensor([3.0, 4.0]).div(12.5**0.5).bfloat16()
    assert half.dtype == torch.bfloat16 and torch.equal(half[0], rounded * weight.bfloat16())
    with pytest.raises(ValueError, match="casting_mode must be \"llama\", got 'gemma'"):
        LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "gemma", False)


def test_rotary_embedding_turns_pairs_by_their_angles(no_cuda: None, packages) -> None:
    packages("opensora", VERSION_2)
    assert liger_kernels.install()
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(2))
    angles = torch.linspace(0, 3, 2 * 5 * 4, dtype=torch.float64).view(2, 5, 4)
    cos, sin = (function(angles).repeat(1, 1, 2) for function in (torch.cos, torch.sin))
    for x, turned in zip((q, k), LigerRopeFunction.apply(q, k, cos, sin), strict=True):
        expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
        torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag], -1), **FLOAT64)
    assert LigerRopeFunction.apply(q.bfloat16(), k.bfloat16(), cos.float(), sin.float())[0].dtype == torch.bfloat16


def test_the_asynchronous_writer_can_be_imported_and_says_what_to_set(packages) -> None:
    packages("opensora", VERSION_2)
    assert async_writer.install()
    from tensornvme.async_file_io import AsyncFileWriter

    with pytest.raises(RuntimeError, match="set async_io=False"):
        AsyncFileWriter("file", 1)


def test_only_setup_device_sees_a_device(no_cuda: None, packages) -> None:
    source = (
        "import torch\n"
        "def setup_device(rank):\n"
        "    assert torch.cuda.is_available()\n"
        "    return rank % torch.cuda.device_count(), torch.device('cpu')\n"
    )
    packages("opensora", {"utils/train.py": source})
    assert device_setup.install()
    from opensora.utils.train import setup_device

    assert setup_device(3) == (0, torch.device("cpu"))
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0


def test_broadcasts_stay_on_the_cpu(no_cuda: None, packages, monkeypatch: pytest.MonkeyPatch) -> None:
    config = "import torch\ndef sync_string(value): return value, torch.zeros(1).cuda().device.type\n"
    datasets = (
        "import torch.distributed as dist\n"
        "def sync_object_across_devices(obj, rank=0):\n"
        "    objects = [obj]\n"
        "    dist.broadcast_object_list(objects, src=rank, device='cuda')\n"
        "    return objects[0]\n"
    )
    packages("opensora", {"utils/config.py": config, "datasets/utils.py": datasets})
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: pytest.fail("moved to CUDA"))
    assert cuda_broadcasts.install()
    from opensora.datasets.utils import sync_object_across_devices
    from opensora.utils.config import sync_string

    assert sync_string("003") == ("003", "cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert sync_object_across_devices({"64px": 1}) == {"64px": 1}
    finally:
        dist.destroy_process_group()


def test_memory_is_not_pinned(no_cuda: None, packages) -> None:
    packages("opensora", {"utils/ckpt.py": "import torch\ndef buffer(): return torch.empty(2, 3, pin_memory=True)\n"})
    pinning = "def _pin_tensor(tensor, empty=True): return tensor.pin_memory()\n"
    packages("colossalai", {"checkpoint_io/utils.py": pinning})
    assert pinned_memory.install()
    from colossalai.checkpoint_io.utils import _pin_tensor
    from opensora.utils.ckpt import buffer

    value = torch.arange(6.0)
    assert buffer().shape == (2, 3) and _pin_tensor(value, empty=False) is value
    assert _pin_tensor(value).shape == value.shape and _pin_tensor(value).data_ptr() != value.data_ptr()


def test_nothing_is_compiled(no_cuda: None, packages) -> None:
    packages("opensora", VERSION_2)
    assert compilation.install()
    compiled = torch.compile(lambda x: x + 1, backend=lambda *arguments: pytest.fail("compiled"))
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))


def test_a_script_of_2_0_is_a_world_of_one_unless_launched(no_cuda: None, packages, monkeypatch: pytest.MonkeyPatch) -> None:
    packages("opensora", VERSION_2)
    assert world_of_one.install() and os.environ["WORLD_SIZE"] == "1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not world_of_one.install() and os.environ["WORLD_SIZE"] == "2"


# Stand-ins for the host's networks (opensora_perflow.hosts.tiny)

REGISTRY = "from mmengine.registry import Registry\nMODELS = Registry('model')\n"
STDIT3 = """
from torch import nn
class STDiT3Config:
    def __init__(self, **kwargs): self.__dict__.update(kwargs)
class STDiT3(nn.Linear):
    def __init__(self, config): super().__init__(config.hidden_size, config.depth)
"""


@pytest.fixture
def tiny(packages, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    packages("opensora", {"registry.py": REGISTRY, "models/stdit/stdit3.py": STDIT3})
    monkeypatch.delitem(sys.modules, "opensora_perflow.hosts.tiny", raising=False)
    yield importlib.import_module("opensora_perflow.hosts.tiny")
    del sys.modules["opensora_perflow.hosts.tiny"]


def test_tiny_stand_ins_need_the_host_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opensora_perflow.hosts.tiny", raising=False)
    absent(monkeypatch, "opensora")
    absent(monkeypatch, "opensora.registry")
    with pytest.raises(ImportError, match="python -m opensora_perflow.run ROOT/scripts"):
        importlib.import_module("opensora_perflow.hosts.tiny")


def test_tiny_network_loads_every_weight_or_refuses(tiny: ModuleType, tmp_path: Path) -> None:
    network = tiny.MODELS.build({"type": "perflow_tiny_stdit3", "hidden_size": 8, "depth": 2, "num_heads": 2})
    assert network.weight.shape == (2, 8)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    again = tiny.tiny_stdit3(tmp_path / "model.pt", hidden_size=8, depth=2, num_heads=2)
    assert torch.equal(again.weight, network.weight)
    with pytest.raises(ValueError, match=r"bias is \[2\], the network's is \[3\]"):
        tiny.tiny_stdit3(tmp_path / "model.pt", hidden_size=8, depth=3, num_heads=2)
    torch.save({"weight": network.weight.detach(), "other": torch.zeros(1)}, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="bias is missing; other is not in the network"):
        tiny.tiny_stdit3(tmp_path / "half.pt", hidden_size=8, depth=2, num_heads=2)
    with pytest.raises(ValueError, match="got hidden_size=10, num_heads=4, depth=2"):
        tiny.tiny_stdit3(hidden_size=10)


def test_tiny_vae_shrinks_videos_to_the_size_that_the_teacher_knows(tiny: ModuleType) -> None:
    """192 x 192 pixels, the host's smallest square, as the 64 x 64 that they are the enlargement of."""
    plain, shrinking = tiny.HostVAE(), tiny.HostVAE(shrink=3)
    small = torch.rand(1, 3, 17, 64, 64) * 2 - 1
    large = small.repeat_interleave(3, 3).repeat_interleave(3, 4)
    assert shrinking.get_latent_size([17, 192, None]) == [5, 8, None]
    with torch.no_grad():
        torch.testing.assert_close(shrinking.encode(large), plain.encode(small), rtol=1e-4, atol=1e-4)  # float32
        assert shrinking.encode(large.bfloat16()).dtype == torch.bfloat16
        latents = plain.encode(small)
        video = shrinking.decode(latents, num_frames=17)
        assert torch.equal(video[..., 1::3, 1::3], plain.decode(latents)) and video.shape == large.shape
        assert shrinking.decode(latents[0]).shape == (3, 17, 192, 192)


def test_tiny_vae_and_text_take_the_hosts_settings(tiny: ModuleType) -> None:
    vae = tiny.MODELS.build({"type": "perflow_tiny_vae", "pretrained": False, "micro_batch_size": 4, "from_pretrained": "x"})
    latents = torch.zeros(4, 5, 2, 2)  # v1.3 decodes one sample without a batch axis
    assert vae.decode(latents, num_frames=17).shape == (3, 17, 16, 16)
    assert vae.decode(latents[None], num_frames=51).shape == (1, 3, 17, 16, 16)  # the length of three loops, one of them here
    assert vae.temporal_overlap and vae.micro_frame_size == 17
    with pytest.raises(ValueError, match="shrink must be a whole number"):
        tiny.HostVAE(pretrained=False, shrink=0)
    text = tiny.MODELS.build(
        {"type": "perflow_tiny_text", "from_pretrained": "x", "shardformer": True, "dtype": torch.bfloat16}
    )
    encoded = text.encode(**text.tokenize_fn(["a red circle"]))
    assert encoded["y"].shape == (1, 1, text.model_max_length, text.output_dim) and encoded["y"].dtype == torch.bfloat16


HUNYUAN = """
from dataclasses import dataclass
import torch
from torch import nn
@dataclass
class AutoEncoder3DConfig:
    from_pretrained: str | None
    block_out_channels: tuple
    layers_per_block: int
    norm_num_groups: int
    latent_channels: int = 16
class AutoencoderKLCausal3D(nn.Linear):
    def __init__(self, config): super().__init__(3, config.latent_channels)
    def encode(self, x, sample_posterior=True): return self(x)
    def decode(self, z): return z @ self.weight
"""


@pytest.fixture
def tiny_2(packages, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    conditioner = "from torch import nn\nclass HFEmbedder(nn.Module): ...\n"
    hunyuan = {"models/hunyuan_vae/autoencoder_kl_causal_3d.py": HUNYUAN}
    packages("opensora", {"registry.py": REGISTRY, "models/text/conditioner.py": conditioner, **hunyuan})
    monkeypatch.delitem(sys.modules, "opensora_perflow.hosts.v2.tiny", raising=False)
    yield importlib.import_module("opensora_perflow.hosts.v2.tiny")
    del sys.modules["opensora_perflow.hosts.v2.tiny"]


def test_tiny_stand_ins_of_2_0_need_the_host_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opensora_perflow.hosts.v2.tiny", raising=False)
    absent(monkeypatch, "opensora")
    with pytest.raises(ImportError, match="python -m opensora_perflow.run ROOT/scripts/diffusion"):
        importlib.import_module("opensora_perflow.hosts.v2.tiny")


def test_tiny_embedders_speak_the_demos_words(tiny_2: ModuleType) -> None:
    t5 = tiny_2.MODELS.build({"type": "perflow_tiny_t5", "max_length": 6, "shardformer": True, "torch_dtype": torch.float32})
    words = t5.encoder.encode(["a red circle", ""])["y"][:, 0]
    assert torch.equal(t5(["a red circle", ""]), words) and torch.equal(t5(""), words[1:])
    aligned = t5(["a red circle"], added_tokens=3, seq_align=4)  # 3 + 6 tokens and 3 more
    assert torch.equal(aligned[:, :6], words[:1]) and torch.equal(aligned[:, 6:], torch.zeros(1, 3, 32))
    clip = tiny_2.MODELS.build({"type": "perflow_tiny_clip", "output_dim": 32, "torch_dtype": torch.float32})
    # Three words and the end token; padding, which is zeros, does not count. float32 sums of four.
    torch.testing.assert_close(clip(["a red circle"])[0], words[0, :4].mean(0), rtol=1e-6, atol=1e-6)
    assert torch.equal(clip("")[0], words[1, 0]) and clip.is_clip and not t5.is_clip
    assert tiny_2.tiny_t5()(["x"]).dtype == torch.bfloat16


def test_tiny_hunyuan_vae_is_the_same_everywhere_and_computes_in_float32(tiny_2: ModuleType) -> None:
    state = torch.get_rng_state()
    vae, again = (tiny_2.MODELS.build({"type": "perflow_tiny_hunyuan_vae", "torch_dtype": torch.bfloat16}) for _ in range(2))
    assert torch.equal(vae.weight, again.weight) and torch.equal(torch.get_rng_state(), state)
    assert vae.cfg.latent_channels == 16 and tiny_2.tiny_hunyuan_vae(latent_channels=4).cfg.latent_channels == 4
    x = torch.ones(1, 3).bfloat16()
    assert torch.equal(vae.encode(x), nn.functional.linear(torch.ones(1, 3), vae.weight, vae.bias).bfloat16())
    assert torch.equal(vae.decode(torch.ones(1, 16).bfloat16()), (torch.ones(1, 16) @ vae.weight).bfloat16())
