"""What `opensora-perflow encode` and `store` do inside Open-Sora 1.2 and 1.3: captions to embeddings, noise to stored chains.

Data set, buckets, text encoder, VAE and network are built as scripts/train.py builds them, from the same config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opensora_perflow.hosts.chains import check_recipe
from opensora_perflow.hosts.clips import Clips, clips_digest
from opensora_perflow.hosts.encoded_captions import are_encoded, refuse_encoded
from opensora_perflow.hosts.script import read_host_config
from opensora_perflow.hosts.storing import Progress, Workers, dtype_of, refuse_other_chains, solve_chains
from opensora_perflow.hosts.v1.chain_solver import chain_solver, planned
from opensora_perflow.hosts.v1.conditions import encode_text
from opensora_perflow.hosts.v1.encoded_text import EncodedText, encode_captions, write_latent_sizes
from opensora_perflow.hosts.v1.scheduler import PeRFlow
from opensora_perflow.hosts.v1.stored_chains import path_settings
from opensora_perflow.hosts.v1.weights import check_there
from opensora_perflow.training.store import Origin
from opensora_perflow.training.teacher import origin_of

SECTIONS = ("model", "vae", "text_encoder", "dataset", "bucket_config", "scheduler")


def encode(config: Path, out: Path, progress: Progress, data_path: Path | None = None) -> int:
    """Encode the captions of a training config's data set that the folder `out` lacks; how many this process encoded.

    The sizes of latents in all buckets are written beside them, so that the training needs no VAE either.

    Args:
        data_path: The table of captions; None: the config's.

    Raises:
        ValueError: see `read_training_config` and encoded_text.encode_captions.
    """
    cfg, workers = read_training_config(config, data_path), Workers.started()
    refuse_encoded(cfg.text_encoder)
    count = _encode(cfg, _build(cfg.dataset, "DATASETS"), out, workers, progress)
    if workers.rank == 0:
        write_latent_sizes(out, _latent_sizes(cfg.bucket_config, _build(cfg.vae, "MODELS")))
    return count


def main(cfg: Any, out: Path, chains: int | None, workers: Workers, progress: Progress, first_window: int = 0) -> int:
    """Solve chains, see hosts/storing.py: a script's main(), so that whoever asks for a running script's config finds `cfg`.

    The texts' embeddings are kept in `out`/text, unless the config's text encoders are such a folder already.
    """
    scheduler = PeRFlow(**{name: value for name, value in cfg.scheduler.items() if name != "type"})
    recipe, seed = scheduler.recipe, int(cfg.get("seed", 1024))
    check_recipe(recipe)
    # Before a text encoder of 19 GB is loaded.
    if recipe.teacher.from_pretrained is not None:
        check_there(recipe.teacher.from_pretrained)
    dataset = _build(cfg.dataset, "DATASETS")
    captions = list(map(str, dataset.data["text"]))
    digest = clips_digest(dataset) if recipe.draws.starts == "diffused" else None
    source = origin_of(recipe.teacher, scheduler.host)
    origin = Origin.of(recipe, path_settings(scheduler.keys), "", *source, "float16", seed)
    refuse_other_chains(out, replace(origin, first_window=first_window), captions, cfg.bucket_config, digest)
    if cfg.text_encoder.type != "perflow_encoded":
        _encode(cfg, dataset, out / "text", workers, progress)
    folder = cfg.text_encoder.folder if cfg.text_encoder.type == "perflow_encoded" else out / "text"
    text = EncodedText(folder, workers.device, dtype_of(cfg))
    vae = _build(cfg.vae, "MODELS")
    solver = chain_solver(scheduler, _network(cfg, text, vae, workers), text, seed, dtype_of(cfg))
    solver = replace(solver, origin=replace(solver.origin, first_window=first_window))
    parts = planned(dataset, cfg.bucket_config, vae, solver.origin)
    wanted = len(dataset) if chains is None else chains
    clips = None
    if digest is not None:
        device, dtype = workers.device, dtype_of(cfg)
        clips = Clips(dataset, vae.to(device, dtype).eval(), device, dtype, seed, digest, own=("fps",))
    return solve_chains(out, solver, parts, wanted, captions, cfg.bucket_config, workers, progress, clips)


def read_training_config(config: Path, data_path: Path | None) -> Any:
    """A training config, with the config's own imports done.

    Raises:
        ValueError: a config that cannot be read, or without a section that is needed, or another scheduler than perflow.
    """
    found = read_host_config(config, is_v2=False)
    missing = [name for name in SECTIONS if not found.get(name)]
    if missing or found.scheduler.get("type") != "perflow":
        what = f"no {', '.join(missing)}" if missing else 'no scheduler=dict(type="perflow", ...)'
        raise ValueError(f"{str(config)!r} has {what}; name the config of a training, such as perflow_data_free.py")
    if found.vae.type == "perflow_latents":
        raise ValueError(
            f"{str(config)!r} trains without a VAE, whose sizes of latents are needed here; name the config that it is based "
            "on, such as perflow_data_free.py"
        )
    if data_path is not None:
        found.dataset.data_path = str(data_path)
    return found


def _encode(cfg: Any, dataset: Any, out: Path, workers: Workers, progress: Progress) -> int:
    # T5's shardformer is for training in many processes, as in embed.py.
    settings = {name: value for name, value in cfg.text_encoder.items() if name != "shardformer"}
    captions = list(dict.fromkeys(map(str, dataset.data["text"])))
    kind = {"type": settings["type"], "from_pretrained": settings.get("from_pretrained"), "dtype": str(dtype_of(cfg))}
    if are_encoded(out, captions, kind):  # no text encoder of 19 GB is loaded to find nothing to do
        workers.barrier()
        return 0
    encoder = _build(settings, "MODELS", device=workers.device, dtype=dtype_of(cfg))
    header = {"text_encoder": kind, "model_max_length": encoder.model_max_length, "output_dim": encoder.output_dim}

    @torch.no_grad()
    def encoded(texts: Sequence[str]) -> Mapping[str, Any]:
        return encode_text(encoder, texts)

    return encode_captions(
        out, captions, encoded, header,
        rank=workers.rank, world=workers.world, barrier=workers.barrier, progress=progress(len(captions), "captions"),
    )  # fmt: skip


def _latent_sizes(bucket_config: Mapping[str, Any], vae: Any) -> dict[tuple[int, int, int], tuple[int, ...]]:
    from opensora.datasets.bucket import Bucket

    return {
        (num_frames, height, width): (vae.out_channels, *vae.get_latent_size((num_frames, height, width)))
        for lengths in Bucket(bucket_config).ar_criteria.values()
        for num_frames, ratios in lengths.items()
        for height, width in ratios.values()
    }


def _network(cfg: Any, text: EncodedText, vae: Any, workers: Workers) -> Any:
    """The network as train.py builds it; of adapters, what they add to."""
    network = _build(
        cfg.model.get("base") or cfg.model,
        "MODELS",
        input_size=vae.get_latent_size((None, None, None)),
        in_channels=vae.out_channels,
        caption_channels=text.output_dim,
        model_max_length=text.model_max_length,
        enable_sequence_parallelism=False,
    )
    return network.to(workers.device, dtype_of(cfg)).eval()


def _build(settings: Any, registry: str, **others: Any) -> Any:
    import opensora.registry as host

    return host.build_module(settings, getattr(host, registry), **others)
