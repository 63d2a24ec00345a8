"""What is wrong with a run of Open-Sora 2.0, told before its models are built."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from mmengine.registry import Registry

from opensora_perflow.checks import shown
from opensora_perflow.hosts.chains import open_store
from opensora_perflow.hosts.script import before_builds
from opensora_perflow.hosts.v2.host import OpenSora2
from opensora_perflow.hosts.v2.keys import Keys, read_config
from opensora_perflow.hosts.v2.models import register
from opensora_perflow.hosts.v2.stored_chains import WHERE, path_settings
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.teacher import check_source

logger = logging.getLogger("opensora_perflow")

MOST_SIGMA_MIN = 1e-3
"""The share of noise in data that is lost in bfloat16, which has steps of 2^-8."""

_checked: list[Mapping[str, Any]] = []


def register_with_host() -> None:
    """Enter the factories in Open-Sora 2.0's MODELS, and the checks before its builds; does nothing without that host."""
    try:
        from opensora import registry as host
    except ImportError:
        return
    if hasattr(host, "SCHEDULERS") or not isinstance(getattr(host, "MODELS", None), Registry):
        return
    register(host.MODELS)
    before_builds([host.MODELS, host.DATASETS], check_run)


def check_run(config: Mapping[str, Any]) -> None:
    """Look at a script's config, once.

    Raises:
        ValueError: what would fail, or train something else than is meant.
    """
    model = config.get("model") or {}
    if any(config is other for other in _checked) or not isinstance(model, Mapping):
        return
    _checked[:] = [config]
    if model.get("type") != "perflow_flux":
        _refuse_stray_keys(config, model)
        return
    recipe, keys = read_config(model.get("perflow"))
    if "perflow" in config:
        raise ValueError("the config says perflow=... beside model=...; the keys belong inside: model=dict(perflow=dict(...))")
    if config.get("optim") is None:  # inference.py
        return
    _check_training(config, recipe)
    _check_stored(config, recipe, keys)


def _check_training(config: Mapping[str, Any], recipe: Recipe) -> None:
    _check_plugin(config, recipe)
    _check_host()
    _check_accumulation(config)
    _check_adapters(config, recipe)
    diffused = recipe.draws.starts == "diffused"
    if diffused and config.get("sigma_min", 1e-5) > MOST_SIGMA_MIN:
        raise ValueError(
            f"sigma_min={config['sigma_min']}: data then has more noise than its time says, which diffused starts go by; use "
            f'sigma_min <= {MOST_SIGMA_MIN:g}, or draws=dict(starts="student")'
        )
    if recipe.guidance.folded or not diffused:
        _check_encoders(config)
    if recipe.guidance.folded and config.get("dropout_ratio"):
        logger.warning(
            "guidance is folded in, so texts that dropout_ratio drops teach the student nothing of it; write dropout_ratio=None"
        )
    if config.get("ema_decay") is not None and not config.get("lora_config"):
        _check_ema(config)
    if not recipe.teacher.allow_distilled and recipe.teacher.stored is None:
        check_source(recipe.teacher, OpenSora2(), kept=recipe.teacher.from_pretrained is None)


def _check_stored(config: Mapping[str, Any], recipe: Recipe, keys: Keys) -> None:
    """Stored chains, their data set and their latents go together."""
    if (config.get("dataset") or {}).get("type") == "perflow_stored" and recipe.teacher.stored is None:
        raise ValueError(f"the dataset type perflow_stored names stored chains; say which: {WHERE}")
    if recipe.teacher.stored is None:
        return
    wanted = {"dataset.type": "perflow_stored", "cached_video": True, "condition_config": None}
    found = {
        "dataset.type": (config.get("dataset") or {}).get("type"),
        "cached_video": bool(config.get("cached_video")),
        "condition_config": config.get("condition_config"),
    }
    wrong = [name for name in wanted if found[name] != wanted[name]]
    if wrong:
        raise ValueError(
            f"teacher.stored={shown(recipe.teacher.stored)} trains from stored chains of text to video, and the config says "
            + ", ".join(f"{name}={shown(found[name])}" for name in wrong)
            + "; write "
            + ", ".join(f"{name}={shown(wanted[name])}" for name in wrong)
        )
    open_store(recipe, path_settings(keys, (config["model"]).get("patch_size", 2)))


def _refuse_stray_keys(config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    if "perflow" in model or "perflow" in config:
        raise ValueError(
            f"the config has PeRFlow's keys (perflow=...) and model=dict(type={shown(model.get('type'))}), which knows none of "
            'them; write model=dict(type="perflow_flux", perflow=dict(...), ...)'
        )


def _check_plugin(config: Mapping[str, Any], recipe: Recipe) -> None:
    sizes = {name: (config.get("plugin_config") or {}).get(name, 1) for name in ("pp_size", "tp_size", "sp_size")}
    if sizes["pp_size"] > 1:
        raise ValueError(
            f"plugin_config.pp_size={sizes['pp_size']}: with pipeline parallelism the network's answer is another process's, "
            "and PeRFlow's loss does not reach it; use pp_size=1 with tp_size, sp_size or zero2"
        )
    if max(sizes.values()) > 1 and recipe.curriculum is not None and recipe.curriculum.teacher == "previous":
        raise ValueError(
            f'curriculum.teacher="previous" copies the student in mid-run, which is split over processes with {sizes}; use '
            'curriculum=dict(teacher="original", ...), or zero2'
        )


def _check_host() -> None:
    colossalai = sys.modules.get("colossalai")  # train.py has imported it; `check` does not wait for that
    if colossalai is None:
        return
    from colossalai.checkpoint_io import CheckpointIO

    if not hasattr(CheckpointIO, "synchronize"):
        raise ValueError(
            f"Open-Sora 2.0's train.py calls CheckpointIO.synchronize, which ColossalAI {colossalai.__version__} does not "
            "have; install colossalai>=0.5.0"
        )


def _check_accumulation(config: Mapping[str, Any]) -> None:
    steps, every = config.get("accumulation_steps", 1), config.get("ckpt_every", 0)
    resumes = config.get("load") is not None or config.get("start_step") is not None
    if steps > 1 and every > 0 and not resumes:
        raise ValueError(
            f"accumulation_steps={steps} with ckpt_every={every}: Open-Sora 2.0 also saves before the optimizer's first step, "
            f"when there is no state to save, and fails; write start_step={steps - 1}"
        )


def _check_ema(config: Mapping[str, Any]) -> None:
    folder = config.get("load")
    if folder is not None and not os.path.isfile(os.path.join(folder, "ema.safetensors")):
        raise ValueError(
            f"load={shown(folder)} with ema_decay={config['ema_decay']}: no ema.safetensors is there, and an ema.pt of "
            "Open-Sora 2.0 is one process's part of the average, which it cannot load itself; write ema_decay=None"
        )


def _check_adapters(config: Mapping[str, Any], recipe: Recipe) -> None:
    lora, adapters = config.get("lora_config"), config.get("lora_checkpoint")
    if not lora:
        if adapters is not None:
            raise ValueError(
                f"lora_checkpoint={shown(adapters)} without lora_config: Open-Sora 2.0 would train the whole network and leave "
                "the adapters out; write lora_config as it was for them"
            )
        return
    if config.get("load") is not None:
        raise ValueError(
            f"load={shown(config['load'])} with lora_config: Open-Sora 2.0 looks for a whole network there; go on from "
            'adapters with lora_checkpoint="epochE-global_stepG/lora"'
        )
    bias, first = lora.get("bias", "none"), lora.get("init_lora_weights", True)
    if recipe.teacher.from_pretrained is None and (bias != "none" or (isinstance(first, str) and first != "gaussian")):
        raise ValueError(
            f"lora_config with bias={shown(bias)} and init_lora_weights={shown(first)} changes weights of the network itself, "
            'which without its adapters is the teacher; use bias="none" and init_lora_weights=True, or name the teacher in '
            "teacher=dict(from_pretrained=...)"
        )
    if recipe.guidance.mode == "range" and "guidance_in" not in (lora.get("modules_to_save") or ()):
        raise ValueError(
            'guidance mode "range" tells the network its scale by new weights, guidance_in, which adapters neither train nor '
            'save; write lora_config=dict(modules_to_save=["guidance_in"], ...)'
        )


def _check_encoders(config: Mapping[str, Any]) -> None:
    if config.get("cached_text"):
        raise ValueError(
            "cached_text=True: without text encoders the empty prompt has no embedding, which guidance needs; use "
            "cached_text=False with perflow_t5 and perflow_clip"
        )
    plain = [name for name in ("t5", "clip") if (config.get(name) or {}).get("type") == "text_embedder"]
    if plain:
        raise ValueError(
            "guidance needs the embedding of the empty prompt, which text_embedder does not note: write "
            + ", ".join(f'{name}=dict(type="perflow_{name}", ...)' for name in plain)
        )
