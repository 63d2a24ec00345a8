"""What is wrong with a run is told before the host builds its models, whichever script calls."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from mmengine import Config
from mmengine.registry import Registry

from opensora_perflow.hosts.v1.early import check_early


@pytest.fixture
def host(monkeypatch):
    """A host's registries, with a text encoder and a training set in them."""
    package, module = ModuleType("opensora"), ModuleType("opensora.registry")
    module.MODELS, module.DATASETS = Registry("model", scope="opensora"), Registry("dataset", scope="opensora")
    module.SCHEDULERS = Registry("scheduler", scope="opensora")
    package.registry, package.__path__, package.__spec__ = module, [], ModuleSpec("opensora", None)
    monkeypatch.setitem(sys.modules, "opensora", package)
    monkeypatch.setitem(sys.modules, "opensora.registry", module)
    module.built = []
    for registry, name in ((module.MODELS, "t5"), (module.DATASETS, "videos")):
        registry.register_module(name=name, module=lambda name=name, **settings: module.built.append(name) or [1, 2])
    check_early()
    check_early()  # as when it is imported by the patch and by run
    return module


def script(host, scheduler, *, batches=None, loader=None, trains=True, **values):
    """Stands for main() of a script, which builds a training set, counts its batches and builds a text encoder."""

    def main():
        cfg = Config(dict(scheduler=scheduler, **values))
        booster = "a booster" if trains else None
        dataset = host.DATASETS.build(dict(type="videos"))
        num_steps_per_epoch, dataloader = batches, loader
        host.MODELS.build(dict(type="t5"))
        return cfg, booster, dataset, num_steps_per_epoch, dataloader

    main()
    return host.built


def test_a_sound_script_is_left_alone(host):
    assert script(host, dict(type="perflow", windows=4), batches=3, loader=[1]) == ["videos", "t5"]
    assert host.MODELS.build(dict(type="t5")) == [1, 2]  # outside a script


@pytest.mark.parametrize(
    "scheduler, values, message",
    [
        (dict(type="perflow", window=4), {}, r"unknown key\(s\) 'window' in scheduler"),
        (dict(type="perflow", cfg_scale="high"), {}, "cfg_scale must be a number >= 0, got 'high'"),
        (dict(type="perflow"), dict(load="outputs/ckpt"), r"resumes from 'outputs/ckpt'.*say where the teacher is"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_built(host, scheduler, values, message):
    with pytest.raises(ValueError, match=message):
        script(host, scheduler, **values)
    assert host.built == []


NEGATIVE = dict(mode="fixed", scale=3.0, negative="nowhere/negative.safetensors")


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(guidance=NEGATIVE), "guidance.negative 'nowhere/negative.safetensors' cannot be read .*opensora-perflow embed"),
        (
            dict(teacher=dict(from_pretrained="./nowhere/epoch0-global_step10")),
            "no checkpoint at './nowhere/epoch0-global_step10'",
        ),
        (dict(teacher=dict(from_pretrained="/nowhere/teacher.pth")), "no checkpoint at '/nowhere/teacher.pth'; accepted"),
    ],
)
def test_files_that_are_not_there_are_told_before_anything_is_built(host, keys, message):
    scheduler = dict(type="perflow", **keys)
    with pytest.raises(ValueError, match=message):
        script(host, scheduler)
    assert host.built == []
    assert script(host, scheduler, trains=False) == ["videos", "t5"]  # sampling reads neither


@pytest.mark.parametrize("source", ["hpcai-tech/OpenSora-STDiT-v3", "OpenSora-v1-HQ-16x256x256.pth", "perflow_tiny_teacher"])
def test_names_of_published_weights_are_left_to_the_first_step(host, source):
    assert script(host, dict(type="perflow", teacher=dict(from_pretrained=source))) == ["videos", "t5"]


def test_a_teacher_that_is_there_is_left_alone(host, tmp_path):
    assert script(host, dict(type="perflow", teacher=dict(from_pretrained=str(tmp_path)))) == ["videos", "t5"]


def test_other_schedulers_are_none_of_our_business(host):
    assert script(host, dict(type="rflow", window=4), batches=0, load="ckpt") == ["videos", "t5"]


class Buckets:
    """1.1's, which its script counts after its models are built."""

    def __init__(self, count):
        self.batch_sampler, self.get_num_batch = self, lambda: count


@pytest.mark.parametrize("counted", [dict(batches=0), dict(loader=[]), dict(loader=Buckets(0))], ids=["1.2", "1.0", "1.1"])
def test_a_training_set_without_a_batch_is_an_error(host, counted):
    with pytest.raises(ValueError, match="the training set gives no batch, of 2 samples: no bucket .* add a bucket"):
        script(host, dict(type="perflow"), **counted)
    assert host.built == ["videos"]
    assert script(host, dict(type="perflow"), loader=Buckets(2))[1:] == ["videos", "t5"]


@pytest.mark.parametrize(
    "section, known", [("vae", ".*t5"), ("model", ".*t5"), ("text_encoder", ".*t5"), ("dataset", "videos")]
)
def test_a_config_of_another_version_says_so(host, section, known):
    message = rf"the config says {section}=dict\(type='V1_3'\), which this Open-Sora .* does not have; .*v1.3.* Known: {known}"
    with pytest.raises(ValueError, match=message):
        script(host, dict(type="perflow"), **{section: dict(type="V1_3")})
    assert host.built == []


def test_a_host_without_those_registries_is_left_alone(monkeypatch):
    module = ModuleType("opensora.registry")
    module.MODELS = None
    package = ModuleType("opensora")
    package.registry = module
    monkeypatch.setitem(sys.modules, "opensora", package)
    monkeypatch.setitem(sys.modules, "opensora.registry", module)
    check_early()
    assert module.MODELS is None
