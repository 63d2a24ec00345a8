"""The process of test_v2_perflow.py's network tests: Open-Sora 2.0's real MMDiT, tiny, with its own denoisers and boosters.

    python _v2_worker.py ROOT

Prints "NAME holds" for each function that is called check_NAME, or why it does not.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _harness import computes_in_half
from _harness_v2 import TINY_FLUX
from torch import Tensor, nn

from opensora_perflow import portable
from opensora_perflow.hosts.v2.early import register_with_host

ROOT = Path(sys.argv[1])
TEXT, FIXED = "a red square", {"guidance": {"mode": "fixed", "scale": 3.0}}
PLAIN = {key: value for key, value in TINY_FLUX.items() if key != "type"}


def build(type: str = "perflow_flux", dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> nn.Module:
    """A network that answers something: the same weights whatever its type."""
    from opensora.registry import MODELS, build_module

    config = {"type": type, "device_map": "cpu", **PLAIN, **settings}
    torch.manual_seed(seed)
    network = build_module(config, MODELS, torch_dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return network


def student(config: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, **settings: Any):
    """A network that is trained, with a teacher of the same weights, and its hooks."""
    from opensora_perflow.hosts.v2.flux import hooks_of
    from opensora_perflow.training.teacher import copy_frozen

    network = build(dtype=dtype, perflow={**FIXED, **(config or {})}, **settings).train()
    hooks, _ = hooks_of(network)
    hooks.host.built = copy_frozen(network)
    return network, hooks


def encoders(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    from opensora.registry import MODELS, build_module

    names = ("perflow_tiny_t5", "perflow_tiny_clip")
    sizes = (TINY_FLUX["context_in_dim"], TINY_FLUX["vec_in_dim"])
    found = [build_module(dict(type=name, output_dim=size), MODELS, torch_dtype=dtype) for name, size in zip(names, sizes)]
    for encoder in found:
        encoder("")
    return tuple(found)


def references(dtype: torch.dtype, latents: Tensor) -> tuple[Tensor, Tensor]:
    masks = torch.zeros_like(latents[:, :1])
    masks[:, :, 0] = 1
    return masks, torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)).to(dtype) * masks


def training_inputs(dtype: torch.dtype = torch.float32, batch_size: int = 2, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """inp and v_t of one step of train.py, with a known first frame."""
    from opensora.utils.sampling import pack, prepare

    torch.manual_seed(seed)
    latents = torch.randn(batch_size, 16, 3, 8, 8).to(dtype)
    inp = prepare(*encoders(dtype), latents, prompt=[TEXT] * batch_size, patch_size=2)
    masks, known = references(dtype, latents)
    t = torch.sigmoid(torch.randn(batch_size)).to(dtype)
    x_0, x_1 = pack(latents), torch.randn(batch_size, 48, 64).to(dtype)
    rest = 1 - t[:, None, None]
    inp["cond"] = pack(torch.cat([masks, known], 1))
    inp["img"] = rest * x_0 + (1 - (1 - 1e-5) * rest) * x_1
    inp["timesteps"], inp["guidance"] = t, torch.full_like(t, 4)
    return inp, (1 - 1e-5) * x_1 - x_0


def loss_of(model: nn.Module, inp: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.mse_loss(model(**inp).float(), target.float(), reduction="mean")


def sampled(
    model: nn.Module, method: str, dtype: torch.dtype, steps: int, mode: Any = torch.inference_mode
) -> tuple[Tensor, Tensor]:
    """What Open-Sora's denoiser makes of noise, and what an Euler loop of one row a step makes of it with plain `flux`."""
    from opensora.utils.inference import SamplingMethod
    from opensora.utils.sampling import SamplingMethodDict, get_schedule, pack, prepare

    denoiser, clips = SamplingMethodDict[SamplingMethod(method)], encoders(dtype)
    z = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    times = get_schedule(steps, 16, 3)
    text, extra = denoiser.prepare_guidance([TEXT], {}, device="cpu", dtype=dtype, neg=None, guidance_img=3.0)
    masks, known = references(dtype, z)
    inp = prepare(*clips, z, prompt=text, patch_size=2)
    inp.update(extra)
    if method == "i2v":
        inp.update(masks=masks, masked_ref=known, sigma_min=1e-5)
    switches = {"text_osci": True, "image_osci": True, "scale_temporal_osci": True}
    with mode():
        found = denoiser.denoise(model, **inp, timesteps=times, guidance=7.5, **switches, flow_shift=None, patch_size=2)
        flux = build("flux", dtype).eval()
        one = prepare(*clips, z, prompt=[TEXT], patch_size=2)
        img = one.pop("img")
        cond = pack(torch.cat([masks, known], 1))
        cond = cond if method == "i2v" else torch.zeros_like(cond)
        for t, t_next in zip(times, times[1:]):
            told = torch.full((1,), t, dtype=dtype)
            img = img + (t_next - t) * flux(img=img, **one, cond=cond, timesteps=told)
    return found, img


def check_denoisers_are_euler_loops() -> None:
    """Bit for bit, with references and oscillation on, one evaluation a step; also where steps refine windows."""
    from opensora_perflow.hosts.v2.flux import hooks_of

    for dtype in (torch.float32, torch.bfloat16):
        for method in ("i2v", "distill"):
            for steps in (4, 12):
                network = build(dtype=dtype, perflow={"windows": 4, **FIXED}).eval()
                found, expected = sampled(network, method, dtype, steps)
                assert torch.equal(found, expected), (dtype, method, steps, (found - expected).abs().max())
                assert hooks_of(network)[0].evaluations == steps


def check_planned_windows_sample_at_their_edges() -> None:
    from opensora.utils.inference import SamplingMethod
    from opensora.utils.sampling import SamplingMethodDict, get_schedule, prepare

    network = build(perflow={"windows": [1.0, 0.6, 0.0], **FIXED}).eval()
    times = []
    network.register_forward_pre_hook(lambda m, a, kwargs: times.append(kwargs["timesteps"][0].item()), with_kwargs=True)
    inp = prepare(*encoders(torch.float32), torch.randn(1, 16, 3, 8, 8), prompt=[TEXT], patch_size=2)
    denoiser = SamplingMethodDict[SamplingMethod.DISTILLED]
    with torch.inference_mode():
        denoiser.denoise(network, **inp, timesteps=get_schedule(2, 16, 3), guidance=1.0, flow_shift=None, patch_size=2)
    alpha = (1 + (16 - 256) * 2 / 3840) * 3**0.5
    assert abs(times[1] - alpha * 0.6 / (1 + (alpha - 1) * 0.6)) < 1e-6 and times[0] == 1.0, times


def check_alpha_is_get_schedule_s() -> None:
    """For every bucket of the stock configs, in patches of 2 (hunyuan_vae) and of 1 (DC-AE): the times of uniform windows are
    Open-Sora's own list."""
    from mmengine.config import Config
    from opensora.datasets.aspect import bucket_to_shapes
    from opensora.utils.sampling import get_schedule

    from opensora_perflow.hosts.v2.keys import read_config
    from opensora_perflow.hosts.v2.sampling import SamplingSettings
    from opensora_perflow.hosts.v2.tokens import Layout

    settings, shapes = SamplingSettings.of(*read_config({"windows": 4})), set()
    for file in sorted((ROOT / "configs" / "diffusion" / "train").glob("*.py")):
        buckets = Config.fromfile(str(file)).get("bucket_config")
        shapes |= {shape[2:] for shape in bucket_to_shapes(buckets)} if buckets else set()
    assert len(shapes) > 500, len(shapes)
    for frames, height, width in shapes:
        for patch, side, frames_each in ((2, 8, 4), (1, 32, 4)):
            rows, columns = height // side // patch, width // side // patch
            layout = Layout((frames - 1) // frames_each + 1, max(rows, 1), max(columns, 1), patch)
            asked = get_schedule(8, layout.rows * layout.columns, layout.frames)
            assert settings.times(asked, layout.alpha) == (asked, []), layout


def check_backward_is_ours() -> None:
    """booster.backward with ZeRO and two micro steps a step: the gradients that plain autograd has of the mean of both losses,
    rounded once more. In float16 ZeRO scales the loss itself. Where the CPU has no float16, a scaled loss stands for it."""
    from colossalai.booster import Booster
    from colossalai.booster.plugin import LowLevelZeroPlugin
    from colossalai.nn.optimizer import HybridAdam

    cases = [("bf16", torch.bfloat16, stage, scale) for stage, scale in ((1, 1), (2, 1), (2, 2**16))]
    if computes_in_half():
        cases += [("fp16", torch.float16, stage, 2**10) for stage in (1, 2)]
    for precision, dtype, stage, scale in cases:
        network, _ = student(dtype=dtype)
        reference, _ = student(dtype=dtype)
        plugin = LowLevelZeroPlugin(
            stage=stage, precision=precision, initial_scale=scale, overlap_allgather=False, cast_inputs=False
        )
        given = 1 if precision == "fp16" else scale
        booster = Booster(plugin=plugin)
        torch.set_default_dtype(dtype)
        model, optimizer, *_ = booster.boost(network, HybridAdam(network.parameters(), lr=1e-3))
        torch.set_default_dtype(torch.float)
        for micro in range(2):
            inp, target = training_inputs(dtype, seed=micro)
            waits = stage == 1 and micro == 0
            with booster.no_sync(model, optimizer) if waits else nullcontext():
                booster.backward(loss=loss_of(model, dict(inp), target) / 2 * given, optimizer=optimizer)
            (loss_of(reference, dict(inp), target) / 2 * scale).backward()
        for (name, parameter), other in zip(network.named_parameters(), reference.parameters(), strict=True):
            gradient = optimizer.get_param_grad(parameter)
            if other.grad is None:
                assert gradient is None or not gradient.any(), name
                continue
            gradient, expected = gradient.flatten()[: other.numel()].float(), other.grad.flatten().float()
            error = (gradient - expected).norm() / expected.norm().clamp(min=1e-9 * scale)
            assert error <= torch.finfo(dtype).eps / 2, (precision, stage, scale, name, error)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None}


def check_checkpointing_changes_no_gradient() -> None:
    """Re-entrant checkpoints compute the same numbers again; roll-outs and the teacher run without (T54), and all blocks of
    the student have theirs back afterwards."""
    from opensora.acceleration import checkpoint

    calls, original = [], checkpoint.checkpoint
    found = []
    for checkpointing, selective in ((False, None), (True, None), (True, (1, 1))):
        network, _ = student({"draws": {"per_solve": 3}}, grad_ckpt_settings=selective)
        if checkpointing:
            checkpoint.set_grad_checkpoint(network)
        calls.clear()
        checkpoint.checkpoint = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
        try:
            torch.manual_seed(1)
            loss = loss_of(network, *training_inputs())
        finally:
            checkpoint.checkpoint = original
        assert len(calls) == (0 if not checkpointing else 2 if selective else 4), len(calls)
        assert all(getattr(module, "grad_checkpointing", False) == checkpointing for module in network.modules())
        loss.backward()
        found.append((loss, gradients(network)))
    (loss, plain), *others = found
    assert len(plain) > 100
    for other_loss, other in others:
        assert torch.equal(loss, other_loss) and plain.keys() == other.keys()
        for name, gradient in plain.items():  # sums over blocks in another order
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def check_an_untrained_student_has_no_loss() -> None:
    config = {"teacher": {"steps_per_window": 1, "solver": "euler"}, "draws": {"edge_mass": 1.0}}
    network, _ = student({**config, "guidance": {"mode": "fixed", "scale": 1.0}})
    assert loss_of(network, *training_inputs()).item() <= 1e-12


def check_the_length_of_a_step_is_told() -> None:
    """No length is the network as it was, to the last bit; and the first layer learns what lengths mean."""
    from opensora_perflow.hosts.scale_input import direction, told

    network, (inp, target) = build("flux").eval(), training_inputs()
    plain = network(**inp)
    with told(network, step=torch.zeros(2)):
        assert torch.equal(network(**inp), plain)
    with told(network, step=torch.tensor([0.5, 0.25])):
        said = network(**inp)
        F.mse_loss(said, target).backward()
    assert ((said - plain).abs().amax((1, 2)) > 1e-3).all()
    assert (network.time_in.in_layer.weight.grad @ direction(256, 1).float()).abs().max() > 1e-6


def check_the_network_is_the_host_s_own() -> None:
    """Its class, which policies look up exactly (T55), its keys, and `flux` as it was."""
    from opensora.models.mmdit.model import Flux, MMDiTModel
    from opensora.registry import MODELS

    network, flux = build(perflow={}), build("flux")
    assert type(network) is MMDiTModel and MODELS.get("flux") is Flux
    assert not flux._forward_pre_hooks and not flux._forward_hooks
    ours, theirs = network.state_dict(), flux.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    inp, _ = training_inputs()
    with torch.no_grad():
        assert torch.equal(network.eval()(**inp), flux.eval()(**inp))


def check_a_policy_leaves_the_hooks_on() -> None:
    """Tensor and sequence parallelism over one process: forward and layers are ColossalAI's, hooks and class stay."""
    from colossalai.accelerator import get_accelerator
    from colossalai.shardformer import ShardConfig, ShardFormer
    from opensora.models.mmdit.distributed import MMDiTPolicy
    from opensora.models.mmdit.model import MMDiTModel

    from opensora_perflow.hosts.v2.flux import hooks_of

    # Layers draw their first weights from the accelerator's random numbers, which a CPU has under other names.
    type(get_accelerator()).get_rng_state = lambda self, device=None: torch.get_rng_state()
    type(get_accelerator()).set_rng_state = lambda self, state, device=None: torch.set_rng_state(state)
    type(get_accelerator()).manual_seed = lambda self, seed: torch.manual_seed(seed)
    # gloo has no all-to-all; over one process it is a copy.
    dist.all_to_all = lambda output, parts, group=None: [one.copy_(other) for one, other in zip(output, parts, strict=True)]
    tp = ShardConfig(tensor_parallel_process_group=dist.group.WORLD, enable_tensor_parallelism=True)
    sp = ShardConfig(
        enable_tensor_parallelism=False,
        sequence_parallel_process_group=dist.group.WORLD,
        enable_sequence_parallelism=True,
        sequence_parallelism_mode="all_to_all",
    )
    for name, config in (("tp", tp), ("sp", sp)):
        network, hooks = student()
        inp, target = training_inputs()
        torch.manual_seed(1)
        before = loss_of(network, dict(inp), target)
        before.backward()
        expected = gradients(network)
        network, hooks = student()
        sharded, _ = ShardFormer(config).optimize(network, MMDiTPolicy())
        assert type(sharded) is MMDiTModel and hooks_of(sharded) == (hooks, sharded), name
        torch.manual_seed(1)
        loss = loss_of(sharded, dict(inp), target)
        torch.testing.assert_close(loss, before, rtol=1e-5, atol=0)
        loss.backward()
        for one, gradient in gradients(sharded).items():
            torch.testing.assert_close(gradient, expected[one], rtol=1e-3, atol=1e-6)
        found, _ = sampled(sharded.eval(), "i2v", torch.float32, 4, torch.no_grad)  # gloo cannot gather in inference mode
        alone, _ = sampled(student()[0].eval(), "i2v", torch.float32, 4)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-4)


def check_reference_frames_go_with_hunyuan_vae() -> None:
    """T50: upstream's prepare_visual_condition reads vae.cfg, which its own class has not."""
    from opensora.registry import MODELS, build_module
    from opensora.utils.train import prepare_visual_condition_causal

    sizes = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
    config = {"in_channels": 3, "out_channels": 3, "latent_channels": 16, **sizes}
    found = []
    for name in ("hunyuan_vae", "perflow_hunyuan_vae"):
        torch.manual_seed(0)
        vae = build_module({"type": name, "device_map": "cpu", **config}, MODELS, torch_dtype=torch.float32).eval()
        video = torch.randn(1, 3, 9, 64, 64)
        torch.manual_seed(1)
        found.append(vae.encode(video))
        try:
            latents, cond = prepare_visual_condition_causal(video, {"i2v_head": 1}, vae)
        except AttributeError as error:
            assert name == "hunyuan_vae" and "cfg" in str(error), error
    assert torch.equal(*found) and latents.shape == (1, 16, 3, 8, 8)
    assert cond.shape == (1, 17, 3, 8, 8) and cond[:, 0, 0].all() and not cond[:, 0, 1:].any()


def check_encoders_note_the_empty_prompt() -> None:
    """perflow_t5 and perflow_clip are Open-Sora's own embedder; train.py asks for "" with a str (contract 1.5)."""
    from opensora.models.text import conditioner
    from opensora.registry import MODELS

    from opensora_perflow.hosts.v2 import text

    class Embedder(nn.Module):
        def __init__(self, from_pretrained: str, **settings: Any) -> None:
            super().__init__()
            self.name = from_pretrained

        def forward(self, prompt: Any, added_tokens: int = 0, seq_align: int = 1) -> Tensor:
            return torch.full((1, 2), float(len(self.name)))

    original, noted = conditioner.HFEmbedder, dict(text._NULLS)
    conditioner.HFEmbedder = Embedder
    try:
        text._NULLS.clear()
        for kind, name in (("t5", "long"), ("clip", "me")):
            encoder = MODELS.build({"type": f"perflow_{kind}", "from_pretrained": name, "device_map": "cpu"})
            encoder(["a"], added_tokens=3, seq_align=1)
            encoder("")
        assert {argument: value[0, 0].item() for argument, value in text._NULLS.items()} == {"txt": 4.0, "y_vec": 2.0}
    finally:
        conditioner.HFEmbedder = original
        text._NULLS.clear()
        text._NULLS.update(noted)


def check_lora_off_is_the_teacher() -> None:
    """Bit-equal, without a second copy; the fingerprint is that of the network before it got adapters (T57)."""
    from peft import LoraConfig, get_peft_model

    from opensora_perflow.hosts.v2.flux import hooks_of
    from opensora_perflow.training.adapters import adapters, adapters_off, base_state
    from opensora_perflow.training.teacher import fingerprint, load_teacher

    network = build(perflow={**FIXED})
    inp, target = training_inputs()
    before, state, plain = fingerprint(network), deepcopy(network.state_dict()), network.eval()(**inp)
    targets = ["img_attn.proj", "img_mlp.0", "q_proj", "linear2"]
    model = get_peft_model(network, LoraConfig(r=4, target_modules=targets, modules_to_save=["cond_in"])).train()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1)
    assert adapters(network) and hooks_of(model)[1] is network
    assert fingerprint(network) == before
    assert base_state(network).keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in base_state(network).items())
    with torch.no_grad(), adapters_off(network):
        assert torch.equal(network.forward(**inp), plain)
    assert not torch.equal(network.forward(**inp), plain)
    needed = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    loss = loss_of(model, inp, target)
    loss.backward()
    hooks = hooks_of(model)[0]
    assert hooks.run.teacher.network is network and hooks.run.teacher.fingerprint == before
    assert needed == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert set(gradients(network)) == needed and all("lora_" in name or "modules_to_save" in name for name in needed)
    loaded = load_teacher(network, None)
    with torch.no_grad():
        assert torch.equal(loaded.forward(**inp), network.forward(**inp))


def check_lora_trains_and_saves_the_embedding_of_scales() -> None:
    """Mode range with modules_to_save=["guidance_in"]: two steps move it, as its first weights are zeros that stop gradients;
    it comes back with the adapters into a network that a sampler builds."""
    from peft import LoraConfig, PeftModel, get_peft_model

    told = {"guidance": {"mode": "range", "scale": [2.0, 8.0]}}
    network = build(perflow=told)
    torch.nn.init.zeros_(network.guidance_in.out_layer.weight)
    torch.nn.init.zeros_(network.guidance_in.out_layer.bias)
    state = deepcopy(network.state_dict())
    model = get_peft_model(network, LoraConfig(r=4, target_modules=["linear2"], modules_to_save=["guidance_in"])).train()
    inp, target = training_inputs()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, dict(inp), target).backward()
        optimizer.step()
    saved = network.guidance_in.modules_to_save["default"]
    assert all(parameter.grad.any() for parameter in saved.parameters())
    model.save_pretrained("lora")
    again = build(perflow=told, seed=3)
    again.load_state_dict({name: value for name, value in state.items() if "guidance_in" not in name}, strict=False)
    again = PeftModel.from_pretrained(again, "lora").eval()
    with torch.no_grad():
        found = [
            other(**{**inp, "guidance": torch.full((2,), scale)}) for other in (again, model.eval()) for scale in (2.0, 8.0)
        ]
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3]) and not torch.equal(found[0], found[1])


def check_a_teacher_of_other_weights_goes_with_lora() -> None:
    """teacher.from_pretrained with adapters: the file's weights, without them."""
    from peft import LoraConfig, get_peft_model

    from opensora_perflow.checkpoints import write_state_dict
    from opensora_perflow.hosts.v2.flux import hooks_of

    other = build("flux", seed=5)
    write_state_dict(Path("other.safetensors"), other.state_dict())
    network = build(perflow={**FIXED, "teacher": {"from_pretrained": "other.safetensors"}})
    model = get_peft_model(network, LoraConfig(r=4, target_modules=["linear2"])).train()
    inp, target = training_inputs()
    loss_of(model, dict(inp), target).backward()
    teacher = hooks_of(model)[0].run.teacher.network
    with torch.no_grad():
        assert torch.equal(teacher.forward(**inp), other.eval()(**inp))


def main() -> None:
    sys.path.insert(0, str(ROOT))
    portable.activate()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{Path('group').resolve()}", rank=0, world_size=1)
    register_with_host()  # the import of the package came before the checkout was on the path
    importlib.import_module("opensora_perflow.hosts.v2.tiny")

    chosen = sys.argv[2:]
    for name, check in list(globals().items()):
        if name.startswith("check_") and (not chosen or name.removeprefix("check_") in chosen):
            try:
                check()
                print(f"{name.removeprefix('check_')} holds", flush=True)
            except Exception:
                print(f"{name.removeprefix('check_')} fails\n{traceback.format_exc()}", flush=True)


if __name__ == "__main__":
    main()
