"""Every config loads, and builds what builds without Open-Sora."""

import json
from pathlib import Path

import pytest
from mmengine import Config

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.hosts.v1.keys import read_config
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.worlds.model import TinySTDiT

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "opensora"
CONFIGS = sorted(path for path in FOLDER.glob("*.py"))


@pytest.fixture
def load():
    # The tiny configs import opensora_perflow.hosts.tiny, which needs Open-Sora: loaded here without their imports.
    return lambda path: Config.fromfile(path, import_custom_modules=False)


def scheduler_keys(load, name):
    return {key: value for key, value in load(FOLDER / f"perflow_{name}.py").scheduler.items() if key != "type"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_builds_and_dumps(path, load):
    config = load(path)
    assert "opensora_perflow" in config.custom_imports["imports"] and not config.custom_imports["allow_failed_imports"]
    scheduler = build_module(config.scheduler, SCHEDULERS)
    json.dumps(config.to_dict())  # train.py writes its config as JSON
    assert scheduler.keys.use_timestep_transform
    if "inference" not in path.stem:
        assert {"model", "vae", "text_encoder", "dataset", "bucket_config", "outputs"} <= set(config)
    else:
        assert {"model", "vae", "text_encoder", "num_frames", "fps", "save_dir", "multi_resolution"} <= set(config)


def test_stages_are_what_they_say(load):
    one, two, three = (build_module(load(FOLDER / f"perflow_stage{n}.py").scheduler, SCHEDULERS).recipe for n in (1, 2, 3))
    assert (one.windows.num_windows, one.guidance.mode) == (4, "sync")
    assert (two.windows.num_windows, two.guidance.mode, two.guidance.scale) == (4, "fixed", 7.0)
    assert (three.windows.num_windows, three.guidance.scale, three.teacher.allow_distilled) == (2, 1.0, True)
    assert "720p" in load(FOLDER / "perflow_stage2.py").bucket_config
    assert "144p" not in load(FOLDER / "perflow_stage2.py").bucket_config


@pytest.mark.parametrize("name", ["inference", "inference_v1_3", "tiny_inference"])
def test_inference_leaves_windows_guidance_and_steps_to_the_checkpoint(name, load):
    assert {"windows", "guidance", "num_sampling_steps", "prediction"}.isdisjoint(scheduler_keys(load, name))


@pytest.mark.parametrize("name", ["inference_stage3", "inference_stage3_v1_3", "tiny_inference_stage3"])
def test_inference_of_stage_3_is_what_stage_3_trains(name, load):
    scheduler = build_module(load(FOLDER / f"perflow_{name}.py").scheduler, SCHEDULERS)
    recipe, _ = read_config(scheduler_keys(load, name.replace("inference_", "")))
    assert (scheduler.windows, scheduler.recipe.guidance) == (recipe.windows, recipe.guidance)
    assert scheduler.grid == (1.0, 0.5, 0.0) and scheduler.settings.crossing == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_checkpoint_folders_can_be_given(path, load):
    """1.3's STDiT3-XL/2 with force_huggingface takes --ckpt-path for a repository; a repository's name loads without it too
    (v1.3 opensora/models/stdit/stdit3.py:613)."""
    assert "force_huggingface" not in load(path).model


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage1_v1_3", "stage2_v1_3", "data_free", "curriculum"])
def test_what_configs_write_out_are_the_defaults(name, load):
    (written, _), default = read_config(scheduler_keys(load, name)), Recipe()
    assert (written.draws.starts, written.draws.edge_mass) == (default.draws.starts, default.draws.edge_mass)
    assert written.times_a_solve == default.times_a_solve
    assert (written.teacher.steps_per_window, written.teacher.solver) == (None, default.teacher.solver)


@pytest.mark.parametrize("name", ["stage1", "stage2", "data_free"])
def test_tiny_runs_begin_with_the_teacher_that_ships_and_can_be_resumed(name, load):
    config, sizes = load(FOLDER / f"perflow_tiny_{name}.py"), TinySTDiT().config
    assert config.model.from_pretrained == config.scheduler.teacher.from_pretrained == "perflow_tiny_teacher"
    assert all(sizes[key] == config.model[key] for key in ("hidden_size", "depth", "num_heads", "qk_norm"))
    assert config.model.input_sq_size == sizes["input_sq_size"] * config.vae.shrink


@pytest.mark.parametrize("version", ["", "_v1_3", "_tiny"])
def test_stage_1_reaches_its_starts_with_the_scale_that_it_is_sampled_with(version, load):
    names = ("tiny_stage1", "tiny_inference") if version == "_tiny" else (f"stage1{version}", f"inference{version}")
    trained, sampled = (scheduler_keys(load, name) for name in names)
    for key in ("cfg_scale", "use_flaw_fix"):
        assert trained.get(key) == sampled.get(key)


def test_guidance_of_1_3_is_upstreams(load):
    """Its configs/opensora-v1-3/inference/t2v.py; oscillation begins after ten steps (force_num), which a student never has."""
    for name in ("stage1_v1_3", "stage2_v1_3", "curriculum_v1_3", "inference_v1_3"):
        assert scheduler_keys(load, name)["use_flaw_fix"] is True


@pytest.mark.parametrize("name, like", [("lora", "stage2"), ("lora_v1_3", "stage2_v1_3"), ("tiny_lora", "tiny_stage2"),
                                        ("tiny_lora_inference", "tiny_inference")])  # fmt: skip
def test_adapters_are_put_on_the_network_of_the_other_configs(name, like, load):
    config = load(FOLDER / f"perflow_{name}.py")
    assert config.model.type == "perflow_lora" and config.model.base == load(FOLDER / f"perflow_{like}.py").model
    assert config.scheduler.get("teacher", {}).get("from_pretrained") is None
    if name.startswith("lora"):
        assert config.scheduler.guidance == load(FOLDER / f"perflow_{like}.py").scheduler.guidance


@pytest.mark.parametrize(
    "name, solved_by", [("stored", "data_free"), ("stored_v1_3", "stage2_v1_3"), ("tiny_stored", "tiny_data_free")]
)
def test_stored_chains_are_trained_as_their_config_solves_them(name, solved_by, load):
    stored, solving = (load(FOLDER / f"perflow_{one}.py") for one in (name, solved_by))
    assert stored.bucket_config == solving.bucket_config and stored.model == solving.model
    for key in ("windows", "guidance", "use_timestep_transform", "use_flaw_fix"):
        assert stored.scheduler.get(key) == solving.scheduler.get(key)
    assert stored.text_encoder.folder == f"{stored.scheduler.teacher.stored}/text" and stored.load_video_features
    assert stored.vae.out_channels == (16 if name.endswith("v1_3") else 4)


def test_the_data_free_config_is_data_free(load):
    config = load(FOLDER / "perflow_data_free.py")
    recipe = build_module(config.scheduler, SCHEDULERS).recipe
    assert recipe.draws.starts == "student" and recipe.guidance.mode == "fixed" and "mask_ratios" not in config


@pytest.mark.parametrize("version", ["", "_v1_3"])
def test_the_curriculum_ends_with_one_window(load, version):
    scheduler = build_module(load(FOLDER / f"perflow_curriculum{version}.py").scheduler, SCHEDULERS)
    assert [windows.num_windows for windows in scheduler.curriculum.stages] == [8, 4, 2, 1]
    assert scheduler.recipe.guidance.mode == "fixed" and scheduler.recipe.teacher.from_pretrained


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_no_config_names_a_local_path(path):
    assert "/mnt" not in path.read_text() and "/home" not in path.read_text()
