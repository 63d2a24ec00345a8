"""What is wrong with a run, told before Open-Sora builds its models.

Open-Sora's scripts build the text encoder, the VAE and the network first and the scheduler after them: a misspelt key of the
scheduler cost the loading of T5-XXL. All of them build with the registries of opensora/registry.py, whose `build_func` is
theirs to have: the package's import puts a check before it, for scripts whose config says scheduler=dict(type="perflow").
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from mmengine.registry import Registry

from opensora_perflow.hosts.install import find_tag, imported_tree
from opensora_perflow.hosts.script import before_builds, main_variable
from opensora_perflow.hosts.v1 import lora, small_decoder
from opensora_perflow.hosts.v1.host import OpenSora
from opensora_perflow.hosts.v1.scheduler import PeRFlow
from opensora_perflow.hosts.v1.stored_chains import open_store
from opensora_perflow.hosts.v1.weights import check_there
from opensora_perflow.training.teacher import check_source

SECTIONS = {"dataset": "DATASETS", "text_encoder": "MODELS", "vae": "MODELS", "model": "MODELS"}
"""Section of a script's config -> the host's registry that builds it."""


def check_early() -> None:
    """Have `check_run` called before anything is built with the host's MODELS and DATASETS, and enter our models in MODELS.

    Does nothing without a 1.x host.
    """
    try:
        from opensora import registry as host
    except ImportError:
        return
    if not hasattr(host, "SCHEDULERS"):  # Open-Sora 2.0
        return
    found = {section: getattr(host, name, None) for section, name in SECTIONS.items()}  # 1.0 has no DATASETS
    registries = {section: registry for section, registry in found.items() if isinstance(registry, Registry)}
    before_builds(registries.values(), partial(check_run, registries))
    if "model" in registries:
        lora.register(registries["model"])
        small_decoder.register(registries["model"])


def check_run(registries: Mapping[str, Registry], config: Mapping[str, Any]) -> None:
    """Raises ValueError for what is wrong with a script whose config says scheduler=dict(type="perflow"); others pass.

    Args:
        registries: Of SECTIONS, those that the host has.
        config: The script's.
    """
    if (config.get("scheduler") or {}).get("type") != "perflow":
        return
    check_script(config)
    for section, registry in registries.items():
        check_type(section, config.get(section), registry)
    if lora.is_meant(config):
        check_type("model.base", config["model"]["base"], registries["model"])
    check_batches()


def check_script(config: Mapping[str, Any]) -> None:
    """Raises ValueError for keys of the scheduler, or of adapters, that are wrong.

    In train.py also for a resumed run that names no teacher, and for files that training needs and that are not there.
    """
    scheduler = PeRFlow(**{key: value for key, value in config["scheduler"].items() if key != "type"})
    teacher, host = scheduler.recipe.teacher, OpenSora()
    adapted = lora.check_config(config, scheduler.recipe)
    if teacher.from_pretrained is None and teacher.stored is None and host.resumed() is not None:
        check_source(teacher, host, kept=adapted)
    if main_variable("booster") is not None:  # train.py of every 1.x tag makes it first, and no other script does
        if teacher.from_pretrained is not None:
            check_there(teacher.from_pretrained)
        scheduler.negative_text()
        open_store(scheduler.recipe, scheduler.keys)


def check_batches() -> None:
    """Raises ValueError where a training set gives no batch: the script would end without a word."""
    if _num_batches() == 0:
        dataset = main_variable("dataset")
        raise ValueError(
            f"the training set gives no batch, of {len(dataset)} samples: no bucket of bucket_config gets a whole batch, or "
            "there are fewer samples than batch_size. Videos shorter or smaller than every bucket are left out: add a bucket "
            "that they fit, or lower its batch size"
        )


def check_type(section: str, settings: Any, registry: Registry) -> None:
    """Raises ValueError where a config asks for a type that this Open-Sora does not have, as one of another version does."""
    name = settings.get("type") if isinstance(settings, Mapping) else None
    if isinstance(name, str) and registry.get(name) is None:
        root = imported_tree()
        raise ValueError(
            f"the config says {section}=dict(type={name!r}), which this Open-Sora ({_tag(root)} in {root}) does not "
            "have; use a config for that version (perflow_*_v1_3.py are for v1.3, the others for v1.2). Known: "
            + ", ".join(sorted(registry.module_dict))
        )


def _tag(root: Any) -> str:
    try:
        return find_tag(root)
    except (TypeError, ValueError):
        return "of no known tag"


def _num_batches() -> int | None:
    """Batches an epoch of the running script; None before it has a dataloader."""
    counted, loader = main_variable("num_steps_per_epoch"), main_variable("dataloader")
    if counted is not None or loader is None:
        return counted
    # 1.0 and 1.1 count later than they build. 1.1's buckets are counted over all processes (scripts/train.py:186).
    count = getattr(getattr(loader, "batch_sampler", None), "get_num_batch", None)
    return len(loader) if count is None else count() // (dist.get_world_size() if dist.is_initialized() else 1)
