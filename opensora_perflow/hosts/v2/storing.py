"""What `opensora-perflow encode` and `store` do inside Open-Sora 2.0: texts to embeddings, noise to stored chains.

Data set, buckets, text encoders and network are built as scripts/diffusion/train.py builds them, from the same config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_perflow.checkpoints import refuse_missing
from opensora_perflow.hosts.chains import check_recipe
from opensora_perflow.hosts.clips import Clips, clips_digest
from opensora_perflow.hosts.encoded_captions import are_encoded, refuse_encoded
from opensora_perflow.hosts.meta import unloaded
from opensora_perflow.hosts.script import read_host_config
from opensora_perflow.hosts.storing import Progress, Workers, dtype_of, refuse_other_chains, solve_chains
from opensora_perflow.hosts.v2.chain_solver import chain_solver, planned
from opensora_perflow.hosts.v2.encoded_text import encode_captions, perflow_encoded_clip, perflow_encoded_t5
from opensora_perflow.hosts.v2.host import OpenSora2
from opensora_perflow.hosts.v2.keys import read_config
from opensora_perflow.hosts.v2.models import flux_of
from opensora_perflow.hosts.v2.outline import meta_encoder
from opensora_perflow.hosts.v2.stored_chains import path_settings
from opensora_perflow.training.store import Origin
from opensora_perflow.training.teacher import origin_of

SECTIONS = ("model", "ae", "t5", "clip", "dataset", "bucket_config")
COLUMNS = ("text", "num_frames", "height", "width", "fps")
ENCODERS = ("t5", "clip")
PATCH = 2
"""Of an MMDiT whose config does not say."""


def encode(config: Path, out: Path, progress: Progress, data_path: Path | None = None) -> int:
    """Encode the texts of a training config's data set that the folder `out` lacks; how many this process encoded.

    Texts are the captions with what train.py adds to them, and the empty prompt.

    Args:
        data_path: The table of captions; None: the config's.

    Raises:
        ValueError: see `read_training_config` and encoded_captions.encode_captions.
    """
    cfg, workers = read_training_config(config, data_path), Workers.started()
    refuse_encoded(cfg.t5)
    return _encode(cfg, _texts(_dataset(cfg)), out, workers, progress)


def main(cfg: Any, out: Path, chains: int | None, workers: Workers, progress: Progress, first_window: int = 0) -> int:
    """Solve chains, see hosts/storing.py: a script's main(), so that whoever asks for a running script's config finds `cfg`.

    The texts' embeddings are kept in `out`/text, unless the config's text encoders are such a folder already.
    """
    recipe, keys = read_config(cfg.model.get("perflow"))
    check_recipe(recipe)
    if recipe.teacher.from_pretrained is not None:  # before text encoders of 10 GB are loaded
        refuse_missing(recipe.teacher.from_pretrained)
    given = [name for name in cfg.get("condition_config") or {} if name != "t2v"]
    if given:
        raise ValueError(
            f"condition_config has {', '.join(given)}, and stored chains are text to video; name a config without given frames"
        )
    dataset, dtype = _dataset(cfg), dtype_of(cfg)
    texts, encoded, seed = _texts(dataset), cfg.t5.type == "perflow_encoded_t5", int(cfg.get("seed", 1024))
    digest = clips_digest(dataset) if recipe.draws.starts == "diffused" else None
    source = origin_of(recipe.teacher, OpenSora2(), kept=recipe.teacher.from_pretrained is None)
    origin = Origin.of(recipe, path_settings(keys, cfg.model.get("patch_size", PATCH)), "", *source, "float16", seed)
    refuse_other_chains(out, replace(origin, first_window=first_window), texts, cfg.bucket_config, digest)
    if not encoded:
        _encode(cfg, texts, out / "text", workers, progress)
    there = {"device_map": workers.device, "torch_dtype": dtype}
    folder = cfg.t5.folder if encoded else str(out / "text")
    t5, clip = perflow_encoded_t5(folder, **there), perflow_encoded_clip(folder, **there)
    t5(""), clip("")  # the texts that guidance leads away from, see text.py
    torch.manual_seed(seed)  # as train.py: where no weights are named, its random ones teach
    network = flux_of(recipe, {**_settings(cfg.model, "type", "perflow"), **there}, trains=True)
    solver = chain_solver(recipe, keys, network, _preparing(cfg, t5, clip, workers, dtype), seed)
    solver = replace(solver, origin=replace(solver.origin, first_window=first_window))
    channels, latent_size = network.in_channels // network.patch_size**2, _latent_size(cfg, dtype)
    parts = planned(dataset, texts, cfg.bucket_config, lambda pixels: (channels, *latent_size(pixels)), solver.origin)
    wanted = len(dataset) if chains is None else chains
    clips = None
    if digest is not None:
        clips = Clips(dataset, _build(cfg.ae, **there), workers.device, dtype, seed, digest)
    return solve_chains(out, solver, parts, wanted, texts, cfg.bucket_config, workers, progress, clips)


def read_training_config(config: Path, data_path: Path | None) -> Any:
    """A training config, with the config's own imports done.

    Raises:
        ValueError: a config that cannot be read, or without a section that is needed, or another model than perflow_flux.
    """
    found = read_host_config(config, is_v2=True)
    missing = [name for name in SECTIONS if not found.get(name)]
    if missing or found.model.get("type") != "perflow_flux":
        what = f"no {', '.join(missing)}" if missing else 'no model=dict(type="perflow_flux", ...)'
        raise ValueError(f"{str(config)!r} has {what}; name the config of a training, such as perflow_256px.py")
    if data_path is not None:
        found.dataset.data_path = str(data_path)
    return found


def _dataset(cfg: Any) -> Any:
    from opensora.registry import DATASETS, build_module

    dataset = build_module(cfg.dataset, DATASETS)
    missing = [name for name in COLUMNS if name not in dataset.data.columns]
    if missing:
        raise ValueError(
            f"{cfg.dataset.get('data_path')!r} has no column {', '.join(missing)}; a table of chains has the columns "
            f"{', '.join(COLUMNS)}"
        )
    return dataset


def _texts(dataset: Any) -> list[str]:
    """The text of each row as train.py gets it, frame rate and motion score included."""
    from opensora.datasets.datasets import TextDataset

    return [str(TextDataset.getitem(dataset, row)["text"]) for row in range(len(dataset))]


def _encode(cfg: Any, texts: Sequence[str], out: Path, workers: Workers, progress: Progress) -> int:
    texts, dtype = list(dict.fromkeys(["", *texts])), dtype_of(cfg)
    # T5's shardformer is for training in many processes.
    settings = {name: _settings(cfg[name], "shardformer") for name in ENCODERS}
    kind: dict[str, Any] = {
        name: {key: one.get(key) for key in ("type", "from_pretrained", "max_length")} for name, one in settings.items()
    }
    kind["dtype"] = str(dtype)
    if are_encoded(out, texts, kind):  # no text encoder of 10 GB is loaded to find nothing to do
        workers.barrier()
        return 0
    there = {"device_map": workers.device, "torch_dtype": dtype}
    encoders = {name: _build(one, **there) for name, one in settings.items()}
    return encode_captions(
        out, texts, **encoders, header={"text_encoder": kind},
        rank=workers.rank, world=workers.world, barrier=workers.barrier, progress=progress(len(texts), "captions"),
    )  # fmt: skip


def _build(settings: Mapping[str, Any], **there: Any) -> Any:
    from opensora.registry import MODELS, build_module

    return build_module(settings, MODELS, **there).eval().requires_grad_(False)


def _preparing(cfg: Any, t5: Any, clip: Any, workers: Workers, dtype: torch.dtype) -> Any:
    from opensora.utils.sampling import prepare

    seq_align = (cfg.get("plugin_config") or {}).get("sp_size", 1)

    def prepared(captions: Sequence[str], latent: Sequence[int]) -> Mapping[str, Tensor]:
        like = torch.zeros(len(captions), *latent, dtype=dtype, device=workers.device)
        told = prepare(t5, clip, like, prompt=list(captions), seq_align=seq_align, patch_size=cfg.get("patch_size", 2))
        return {**told, "guidance": like.new_full((len(captions),), cfg.get("guidance", 4))}

    return prepared


def _latent_size(cfg: Any, dtype: torch.dtype) -> Callable[[Sequence[int]], Sequence[int]]:
    """Frames, height, width -> T, H, W of latents, as the VAE without its weights says."""
    with unloaded():
        return meta_encoder(cfg.ae, dtype).get_latent_size


def _settings(section: Mapping[str, Any], *without: str) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in without}
