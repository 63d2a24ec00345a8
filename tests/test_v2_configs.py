"""Every config for Open-Sora 2.0 loads as train.py and inference.py load it, and says what it should."""

import json
from pathlib import Path

import pytest
from mmengine import Config

from opensora_perflow.hosts.v2.keys import read_config

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "opensora" / "v2"
FRAGMENTS = ("perflow_lora", "perflow_i2v")
CONFIGS = sorted(path for path in FOLDER.rglob("*.py") if path.stem not in FRAGMENTS)
TRAIN = [path for path in CONFIGS if path.parent.name == "train"]
INFERENCE = [path for path in CONFIGS if path.parent.name == "inference"]
SIZES = ("in_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads", "depth", "depth_single_blocks", "axes_dim")


def load(path):
    # The tiny configs import opensora_perflow.hosts.v2.tiny, which needs Open-Sora.
    return Config.fromfile(path, import_custom_modules=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_loads_and_dumps(path):
    config = load(path)
    more = "stored" if "stored" in path.stem else "v2.tiny" if "tiny" in path.stem else None
    imports = ["opensora_perflow"] + [f"opensora_perflow.hosts.{more}"] * (more is not None)
    assert config.custom_imports == {"imports": imports, "allow_failed_imports": False}
    json.dumps(config.to_dict())  # train.py writes its config as JSON
    assert config.model.type == "perflow_flux" and config.model.cond_embed and "perflow" not in config
    read_config(config.model.perflow)
    assert config.dtype == "bf16" and sum(config.model.axes_dim) == config.model.hidden_size // config.model.num_heads


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_training_folds_in_what_open_sora_samples_with(path):
    config = load(path)
    recipe, _ = read_config(config.model.perflow)
    # Its text_osci: guidance on the first 10 of 50 steps, then on the even ones; u falls by 1/50 a step.
    scale = [7.5 if step < 10 or step % 2 == 0 else 1.0 for step in range(50) for _ in "ab"]
    means = [sum(scale[k * 25 : (k + 1) * 25]) / 25 for k in range(4)]
    assert recipe.guidance.mode == "fixed" and recipe.guidance.image_scale == 3.0
    assert recipe.guidance.scale == pytest.approx(means, abs=1e-12)
    assert recipe.windows.num_windows == 4 and recipe.times_a_solve == 1
    assert config.dropout_ratio is None and config.ema_decay == (0.5 if "tiny" in path.stem else 0.9975)
    assert config.async_io is config.save_master_weights is config.load_master_weights is False
    assert config.t5.type.startswith("perflow_") and config.clip.type.startswith("perflow_")
    assert config.ae.type in ("perflow_hunyuan_vae", "perflow_tiny_hunyuan_vae")
    assert config.optim.lr == (1e-3 if "tiny" in path.stem else 1e-4 if "lora" in path.stem else 1e-5)
    assert ("lora_config" in config) == ("lora" in path.stem) and ("condition_config" in config) == ("i2v" in path.stem)
    assert config.plugin == ("hybrid" if "768px" in path.stem else "zero2")


@pytest.mark.parametrize(
    "name, solved_by", [("256px_stored", "256px"), ("256px_stored_lora", "256px_lora"), ("tiny_stored", "tiny")]
)
def test_stored_chains_are_trained_as_their_config_solves_them(name, solved_by):
    stored, solving = (load(FOLDER / "train" / f"perflow_{one}.py") for one in (name, solved_by))
    teacher = stored.model.perflow.teacher.pop("stored")
    changed = {key for key in stored if stored[key] != solving.get(key)}
    assert changed == {"custom_imports", "dataset", "t5", "clip", "cached_video"}
    assert stored.cached_video and stored.dataset.type == "perflow_stored"
    assert stored.t5.folder == stored.clip.folder == f"{teacher}/text"


def test_a_prediction_of_epsilon_networks_is_refused():
    assert read_config({"prediction": "velocity"})[0].prediction == "velocity"
    with pytest.raises(ValueError, match='output a velocity: use prediction="auto"'):
        read_config({"prediction": "ddim_eps"})


@pytest.mark.parametrize("path", INFERENCE, ids=lambda path: path.stem)
def test_inference_leaves_windows_and_guidance_to_the_checkpoint(path):
    config = load(path)
    assert set(config.model.perflow) == {"t2i_steps"} and config.sampling_option.num_steps == 4
    trained = load(FOLDER / "train" / ("perflow_tiny.py" if "tiny" in path.stem else "perflow_256px.py")).model
    assert {name: config.model[name] for name in SIZES} == {name: trained[name] for name in SIZES}
    assert ("img_flux" in config) == ("t2i2v" in path.stem)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_linked_config_finds_its_bases(path, tmp_path):
    """mmengine looks beside the link, not beside what it leads to; install links perflow_*.py of one folder into one folder."""
    for source in path.parent.glob("perflow_*.py"):
        (tmp_path / source.name).symlink_to(source)
    assert load(tmp_path / path.name).to_dict() == load(path).to_dict()


@pytest.mark.parametrize("name", ["perflow_256px", "perflow_768px"])
def test_inference_is_a_fragment_beside_others(name, tmp_path):
    """mmengine refuses bases that share a key."""
    (tmp_path / "plugin.py").write_text("plugin = 'hybrid'\nplugin_config = dict(tp_size=8)\nuse_t2i2v = True\nimg_flux = {}\n")
    child = tmp_path / "child.py"
    child.write_text(f"_base_ = [{str(FOLDER / 'inference' / name)!r} + '.py', 'plugin.py']\n")
    config = load(child)
    assert config.plugin_config.tp_size == 8 and config.model.type == "perflow_flux"


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_config_names_a_local_path(path):
    assert not any(word in path.read_text() for word in ("/mnt", "/home", "/work"))
