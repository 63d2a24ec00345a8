"""What is wrong with a run of Open-Sora 2.0 is told before its models are built, and what its factories build."""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from mmdit import TinyMMDiT, note_nulls
from mmengine import Config
from mmengine.registry import Registry

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.v2 import early, text
from opensora_perflow.hosts.v2.early import register_with_host
from opensora_perflow.hosts.v2.flux import PeRFlowFlux, hooks_of
from opensora_perflow.hosts.v2.keys import read_config
from opensora_perflow.training.state import write_state

TRAINS = dict(optim=dict(lr=1e-3), plugin_config={})
FIXED = dict(guidance=dict(mode="fixed", scale=7.5))
ENCODERS = dict(t5=dict(type="perflow_t5"), clip=dict(type="perflow_clip"))


def module(monkeypatch, name, **values):
    made = ModuleType(name)
    made.__path__, made.__spec__ = [], ModuleSpec(name, None)
    vars(made).update(values)
    monkeypatch.setitem(sys.modules, name, made)
    return made


class Flux:
    """Open-Sora's factory: a network, from a file if there is one. built: The settings of each."""

    def __init__(self):
        self.built = []

    def __call__(self, from_pretrained=None, guidance_embed=False, cond_embed=True, device_map=None, torch_dtype=None):
        self.built.append(dict(from_pretrained=from_pretrained, guidance_embed=guidance_embed))
        network = TinyMMDiT(cond_embed=cond_embed)
        if guidance_embed:
            network.config.guidance_embed = True
            network.guidance_in = torch.nn.Sequential()
            network.guidance_in.in_layer, network.guidance_in.out_layer = torch.nn.Linear(1, 16), torch.nn.Linear(16, 16)
        return network


class Method(dict):
    pass


@pytest.fixture
def host(monkeypatch):
    """Open-Sora 2.0's registries and what our factories import of it."""
    root = module(monkeypatch, "opensora")
    registry = module(monkeypatch, "opensora.registry")
    root.registry = registry
    registry.MODELS, registry.DATASETS = Registry("model", scope="opensora"), Registry("dataset", scope="opensora")
    registry.flux = Flux()
    for name in ("opensora.models", "opensora.models.mmdit", "opensora.models.text", "opensora.utils"):
        module(monkeypatch, name)
    module(monkeypatch, "opensora.models.mmdit.model", Flux=registry.flux)
    module(monkeypatch, "opensora.models.text.conditioner", HFEmbedder=lambda **settings: torch.nn.Identity())
    registry.methods = {"i2v": object(), "distill": object()}
    module(monkeypatch, "opensora.utils.sampling", SamplingMethodDict=registry.methods)
    io = module(monkeypatch, "colossalai.checkpoint_io", CheckpointIO=type("CheckpointIO", (), {"synchronize": None}))
    module(monkeypatch, "colossalai", __version__="0.5.0", checkpoint_io=io)
    registry.MODELS.register_module(name="flux", module=lambda **settings: registry.flux(**settings))
    registry.DATASETS.register_module(name="video_text", module=lambda: [1, 2])
    monkeypatch.setattr(early, "_checked", [])
    monkeypatch.setattr(text, "_NULLS", {})
    register_with_host()
    register_with_host()
    return registry


def script(host, perflow=None, *, model=None, **values):
    """Stands for main() of a script: a data set and the network."""

    def main():
        network = dict(type="perflow_flux", **(model or {})) if perflow is None else dict(perflow=perflow, **(model or {}))
        cfg = Config(dict(model={"type": "perflow_flux", **network}, **{**ENCODERS, **values}))
        host.DATASETS.build(dict(type="video_text"))
        return host.MODELS.build({**cfg.model, "device_map": "cpu", "torch_dtype": torch.float32})

    return main()


def test_registering_leaves_the_host_s_own_as_they_were(host):
    encoders = {f"perflow_{kind}{name}" for kind in ("", "encoded_") for name in ("t5", "clip")}
    assert set(host.MODELS.module_dict) == {"flux", "perflow_flux", "perflow_hunyuan_vae", *encoders}
    network = host.MODELS.build(dict(type="flux"))
    assert hooks_of(network) is None and not network._forward_pre_hooks and not network._forward_hooks
    assert not any(hasattr(method, "denoiser") for method in host.methods.values())


def test_open_sora_1_x_is_left_alone(monkeypatch):
    root = module(monkeypatch, "opensora")
    root.registry = module(monkeypatch, "opensora.registry")
    root.registry.MODELS, root.registry.SCHEDULERS = Registry("model"), Registry("scheduler")
    register_with_host()
    assert root.registry.MODELS.module_dict == {}


def test_a_network_with_hooks_and_its_teacher(host):
    network = script(host, FIXED, **TRAINS)
    hooks, found = hooks_of(network)
    assert found is network and type(network) is TinyMMDiT and hooks.recipe.guidance.scale == 7.5
    teacher = hooks.host.built
    assert teacher is not network and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), teacher.parameters()))
    assert all(method.t2i_steps == 50 for method in host.methods.values())


def test_denoisers_are_wrapped_once(host):
    script(host, FIXED)
    inner = {name: method.denoiser for name, method in host.methods.items()}
    script(host, {**FIXED, "t2i_steps": 4})
    assert {name: method.denoiser for name, method in host.methods.items()} == inner
    assert host.methods["i2v"].t2i_steps == 4


@pytest.mark.parametrize("given", [dict(), dict(lora_config=dict(r=4), **TRAINS)], ids=["sampling", "lora"])
def test_no_second_copy_where_none_is_needed(host, given):
    assert hooks_of(script(host, FIXED, **given))[0].host.built is None


@pytest.mark.parametrize("lora", [{}, dict(lora_config=dict(r=4))])
def test_a_named_teacher_is_loaded_where_the_student_is_built(host, tmp_path, lora):
    """Later its network may be split over processes (T56). What files lack of the embedder of reference frames is zero."""
    other = TinyMMDiT(seed=3)
    state = {name: value for name, value in other.state_dict().items() if not name.startswith("cond_in")}
    write_state_dict(tmp_path / "other.safetensors", state)
    perflow = dict(teacher=dict(from_pretrained=str(tmp_path / "other.safetensors")), **FIXED)
    network = script(host, perflow, **TRAINS, **lora)
    built = hooks_of(network)[0].host.built.state_dict()
    assert all(torch.equal(built[name], value) for name, value in state.items())
    assert not built["cond_in.weight"].any() and not built["cond_in.bias"].any()


def test_a_teacher_of_another_size_is_refused_where_the_student_is_built(host, tmp_path):
    wrong = {**TinyMMDiT().state_dict(), "out.weight": torch.zeros(3, 3)}
    write_state_dict(tmp_path / "wrong.safetensors", wrong)
    for source, match in (
        ("wrong.safetensors", "do not fit the student: .*out.weight"),
        ("none.safetensors", "no checkpoint at"),
    ):
        with pytest.raises(ValueError, match=match):
            script(host, dict(teacher=dict(from_pretrained=str(tmp_path / source)), **FIXED), **TRAINS)


RANGE = dict(guidance=dict(mode="range", scale=(2.0, 8.0)))


def test_mode_range_begins_with_an_embedding_that_changes_nothing(host):
    network = script(host, RANGE, **TRAINS)
    assert network.config.guidance_embed and not network.guidance_in.out_layer.weight.any()
    assert network.guidance_in.in_layer.weight.any()


def student_of_mode_range(folder):
    folder.mkdir(parents=True, exist_ok=True)
    from opensora_perflow.hosts.v2.sampling import SamplingSettings

    hooks = PeRFlowFlux(RANGE)
    write_state(folder, hooks._state(SamplingSettings.of(hooks.recipe, hooks.keys)))
    return folder


def test_a_student_that_was_told_scales_goes_on_with_its_embedding(host, tmp_path):
    model = dict(from_pretrained=str(student_of_mode_range(tmp_path)))
    perflow = {**RANGE, "teacher": dict(allow_distilled=True)}
    assert script(host, perflow, model=model, **TRAINS).guidance_in.out_layer.weight.any()


@pytest.mark.parametrize("by", ["model", "lora"])
def test_a_sampler_builds_the_embedding_that_the_state_tells_of(host, tmp_path, by):
    folder = student_of_mode_range(tmp_path / "epoch0-global_step2")
    (folder / by).mkdir()
    given = dict(model=dict(from_pretrained=str(folder / "model"))) if by == "model" else {}
    if by == "lora":
        given["pretrained_lora_path"] = str(folder / "lora")
    assert script(host, {}, **given).config.guidance_embed
    assert not script(host, dict(guidance=dict(mode="sync")), **given).config.guidance_embed


@pytest.mark.parametrize(
    "modules, accepted", [(None, False), (["cond_in"], False), (["guidance_in"], True), (["cond_in", "guidance_in"], True)]
)
def test_adapters_do_not_train_the_embedding_of_scales(host, modules, accepted):
    lora = dict(r=4, target_modules=["linear2"], modules_to_save=modules)
    if accepted:
        assert script(host, RANGE, lora_config=lora, **TRAINS).config.guidance_embed
        return
    with pytest.raises(ValueError, match=r"mode \"range\".*modules_to_save=\[\"guidance_in\"\]"):
        script(host, RANGE, lora_config=lora, **TRAINS)
    assert host.flux.built == []


@pytest.mark.parametrize("changes", [dict(bias="all"), dict(bias="lora_only"), dict(init_lora_weights="pissa")])
def test_adapters_that_change_the_teacher_are_refused(host, tmp_path, changes):
    """peft then trains, or replaces, weights of the network that is the teacher where its adapters are off."""
    with pytest.raises(ValueError, match='changes weights of the network itself, .* is the teacher; use bias="none"'):
        script(host, FIXED, lora_config=dict(r=4, **changes), **TRAINS)
    assert host.flux.built == []
    write_state_dict(tmp_path / "other.safetensors", TinyMMDiT(seed=3).state_dict())
    named = dict(teacher=dict(from_pretrained=str(tmp_path / "other.safetensors")))
    assert script(host, {**FIXED, **named}, lora_config=dict(r=4, **changes), **TRAINS) is not None
    assert script(host, FIXED, lora_config=dict(r=4, bias="none", init_lora_weights="gaussian"), **TRAINS) is not None


@pytest.mark.parametrize("missing", [None, {}], ids=["None", "empty"])
def test_no_keys_are_the_defaults(host, missing):
    network = script(host, missing, model={"perflow": None} if missing is None else {}, **TRAINS)
    assert hooks_of(network)[0].recipe.windows.num_windows == 4


@pytest.mark.parametrize(
    "perflow, values, message",
    [
        (dict(window=4), {}, r"unknown key\(s\) 'window' in model=dict\(type=\"perflow_flux\""),
        ([4], {}, r"must be a dict of PeRFlow's keys, got \[4\]"),
        ("windows=4", {}, "must be a dict of PeRFlow's keys, got 'windows=4'"),
        (dict(windows=0), {}, "windows"),
        (dict(windows="four"), {}, "windows"),
        (dict(flow_shift=0), {}, "flow_shift must be .* got 0"),
        (dict(flow_shift="auto"), {}, "flow_shift must be .* got 'auto'"),
        (dict(t2i_steps=0), {}, "t2i_steps must be"),
        (dict(sampling_grid="plan"), {}, "sampling_grid must be"),
        (dict(guidance=dict(mode="fixed", scale=[7.0, 4.0])), {}, r"scale.*4"),
        (dict(guidance=dict(mode="fixed", scale=float("nan"))), {}, "guidance.scale"),
        (dict(guidance=dict(mode="range", scale=(8.0, 2.0))), {}, "low < high"),
        (dict(guidance=dict(mode="fixed", scale=3.0, negative="n.safetensors")), {}, "2.0 has two"),
        (
            dict(teacher=dict(stored="store")),
            {},
            r"says dataset.type=None, cached_video=False; write dataset.type='perflow_stored', cached_video=True$",
        ),
        (
            dict(teacher=dict(stored="store")),
            dict(dataset=dict(type="perflow_stored"), cached_video=True, condition_config=dict(t2v=1)),
            r"the config says condition_config=\{'t2v': 1\}; write condition_config=None$",
        ),
        (dict(teacher=dict(stored="no"), **FIXED), dict(dataset=dict(type="perflow_stored"), cached_video=True), "no index"),
        (FIXED, dict(dataset=dict(type="perflow_stored")), r"say which: model=dict\(perflow=dict\(teacher=dict\(stored="),
        (dict(cfg_scale=[7.0, 4.0]), {}, "cfg_scale"),
        (dict(draws=dict(starts="diffused", shares=[1, 2, 2, 1])), {}, r'shares=\[1, 2, 2, 1\] with starts="diffused"'),
        (dict(draws=dict(starts="diffused", overlap=0.5)), {}, 'overlap=0.5 with starts="diffused": .* use starts="student"'),
        (dict(prediction="ddim_eps"), {}, "prediction='ddim_eps' needs an epsilon network"),
        (FIXED, dict(plugin="hybrid", plugin_config=dict(pp_size=2)), "pp_size=2: .* use pp_size=1 with"),
        (
            dict(curriculum=dict(windows=[4, 2], teacher="previous")),
            dict(plugin="hybrid", plugin_config=dict(sp_size=2)),
            'curriculum.teacher="previous" copies the student',
        ),
        (FIXED, dict(accumulation_steps=4, ckpt_every=50), "4 with ckpt_every=50: .* fails; write start_step=3$"),
        (FIXED, dict(lora_checkpoint="out/lora"), "lora_checkpoint='out/lora' without lora_config"),
        (dict(draws=dict(starts="diffused")), dict(sigma_min=0.01), "sigma_min=0.01: .* use sigma_min <= 0.001, or"),
        (FIXED, dict(cached_text=True), "cached_text=True: without text encoders"),
        (FIXED, dict(t5=dict(type="text_embedder")), r't5=dict\(type="perflow_t5", \.\.\.\)$'),
        ({}, dict(clip=dict(type="text_embedder")), r'clip=dict\(type="perflow_clip", \.\.\.\)$'),
        (FIXED, dict(lora_config=dict(r=4), load="outputs/epoch0-global_step4"), "lora_checkpoint="),
    ],
)
def test_wrong_settings_are_told_before_anything_is_built(host, perflow, values, message):
    with pytest.raises(ValueError, match=message):
        script(host, perflow, **{**TRAINS, **values})
    assert host.flux.built == []


KEYS = dict(perflow=dict(windows=4))


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(model=dict(type="flux"), **KEYS), "type='flux'.*, which knows none of them; write model=dict.type=.perflow_flux"),
        (dict(model=dict(type="flux", **KEYS)), "type='flux'.*, which knows none of them; write model=dict.type=.perflow_flux"),
        (dict(model=dict(type="perflow_flux"), **KEYS), "perflow=... beside model=...; the keys belong inside"),
    ],
)
def test_keys_in_a_wrong_place_are_told(host, config, message):
    def main():
        cfg = Config(config)
        return host.DATASETS.build(dict(type="video_text")), cfg

    with pytest.raises(ValueError, match=message):
        main()


def test_configs_of_flux_are_none_of_our_business(host):
    def main():
        cfg = Config(dict(model=dict(type="flux"), **TRAINS, lora_config=dict(r=4), load="x", cached_text=True))
        return host.MODELS.build(cfg.model)

    assert hooks_of(main()) is None


def test_an_ema_that_cannot_be_loaded_is_told(host, tmp_path):
    """T52: ema.pt is rank 0's flat shard; a run of ours writes a file that loads."""
    (tmp_path / "ema.pt").touch()
    with pytest.raises(ValueError, match="with ema_decay=0.99: no ema.safetensors is there.* write ema_decay=None"):
        script(host, FIXED, load=str(tmp_path), ema_decay=0.99, **TRAINS)
    assert host.flux.built == []
    assert script(host, FIXED, load=str(tmp_path), **TRAINS) is not None
    (tmp_path / "ema.pt").rename(tmp_path / "ema.safetensors")
    assert script(host, FIXED, load=str(tmp_path), ema_decay=0.99, **TRAINS) is not None


def test_an_old_colossalai_is_told(host, monkeypatch):
    """T67."""
    sys.modules["colossalai"].__version__ = "0.4.6"
    monkeypatch.setattr(sys.modules["colossalai.checkpoint_io"], "CheckpointIO", object)
    with pytest.raises(ValueError, match="which ColossalAI 0.4.6 does not have; install colossalai>=0.5.0"):
        script(host, FIXED, **TRAINS)
    assert script(host, FIXED) is not None  # sampling needs none


@pytest.mark.parametrize("perflow", [FIXED, {}])
@pytest.mark.parametrize("part", ["", "model"])
def test_a_student_is_no_teacher(host, tmp_path, perflow, part):
    weights = student_of_mode_range(tmp_path / "epoch0-global_step2") / part
    weights.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="were written by a PeRFlow run: they are a student's"):
        script(host, perflow, model=dict(from_pretrained=str(weights)), **TRAINS)
    with pytest.raises(ValueError, match="were written by a PeRFlow run"):
        script(host, {**perflow, "teacher": dict(from_pretrained=str(weights))}, **TRAINS)
    assert host.flux.built == []


def test_a_resumed_run_keeps_the_teacher_that_it_was_built_with(host, tmp_path):
    """train.py loads --load after the network was built, so that from_pretrained is the teacher still."""
    (tmp_path / "running_states.json").write_text("{}")
    network = script(host, FIXED, load=str(tmp_path), **TRAINS)
    assert hooks_of(network)[0].host.built is not None


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(ema_decay=0.9999), ""),
        (dict(dropout_ratio=dict(t5=0.3, clip=0.3)), "write dropout_ratio=None"),
        (dict(ema_decay=0.9999, dtype="fp32"), ""),
        (dict(ema_decay=0.9999, lora_config=dict(r=4)), ""),
        (dict(ema_decay=None, dropout_ratio=None), ""),
    ],
)
def test_what_does_less_than_it_says_is_warned_of_once(host, values, words, caplog):
    with caplog.at_level(logging.WARNING, "opensora_perflow"):
        script(host, FIXED, **TRAINS, **values)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == bool(words) and all(words in warning for warning in warnings)


@pytest.mark.parametrize("more", [dict(start_step=3), dict(load="ckpt"), dict(ckpt_every=0), dict(accumulation_steps=1)])
def test_accumulation_is_left_alone_where_it_works(host, more):
    assert script(host, FIXED, **{**TRAINS, "accumulation_steps": 4, "ckpt_every": 50, **more}) is not None


def test_sampling_wants_no_optimizer_s_settings(host):
    assert script(host, FIXED, t5=dict(type="text_embedder"), cached_text=True, plugin_config=dict(pp_size=2)) is not None


def test_encoders_note_the_empty_prompt(host, monkeypatch):
    encoder = host.MODELS.build(dict(type="perflow_t5", from_pretrained="t5"))
    encoder.forward = lambda text: torch.ones(1, 2, 3)
    encoder("a cat")
    assert text._NULLS == {}
    encoder("")
    assert list(text._NULLS) == ["txt"]


def test_keys_of_the_recipe_and_the_host(monkeypatch):
    note_nulls(monkeypatch)
    recipe, keys = read_config(dict(windows=2, flow_shift=3, cfg_scale=[7.0, 4.0], image_cfg_scale=2, draws=dict(seed=1)))
    assert (recipe.windows.num_windows, keys.flow_shift, keys.cfg_scale) == (2, 3.0, (7.0, 4.0)) and recipe.draws.seed == 1
