"""What `opensora-perflow encode` and `store` do inside Open-Sora 1.2 and 1.3: captions to embeddings, noise to stored chains.

Data set, buckets, text encoder, VAE and network are built as scripts/train.py builds them, from the same config.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opensora_perflow import portable
from opensora_perflow.hosts.script import use_checkout
from opensora_perflow.hosts.v1.chain_solver import ChainSolver, planned
from opensora_perflow.hosts.v1.conditions import encode_text
from opensora_perflow.hosts.v1.encoded_text import EncodedText, are_encoded, encode_captions, write_latent_sizes
from opensora_perflow.hosts.v1.scheduler import PeRFlow
from opensora_perflow.training.shards import text_digest
from opensora_perflow.training.store import ChainWriter, Origin

Progress = Callable[[int, str], Callable[[int], Any]]
"""(total, of what) -> what is told of how many more are done."""
SECTIONS = ("model", "vae", "text_encoder", "dataset", "bucket_config", "scheduler")


@dataclass(frozen=True)
class Workers:
    """The processes that share the work: one, or those of torchrun."""

    rank: int = 0
    world: int = 1

    @classmethod
    def started(cls) -> Workers:
        """This process's place, after it has met the others."""
        found = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if found.world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=30))  # the others may have hours of work left
        return found

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    @property
    def device(self) -> str:
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def encode(config: Path, out: Path, progress: Progress, open_sora: Path | None = None, data_path: Path | None = None) -> int:
    """Encode the captions of a training config's data set that the folder `out` lacks; how many this process encoded.

    The sizes of latents in all buckets are written beside them, so that the training needs no VAE either.

    Args:
        open_sora: Checkout that `opensora` is imported from; None: the installed one.
        data_path: The table of captions; None: the config's.

    Raises:
        ValueError: see `read_training_config` and encoded_text.encode_captions.
    """
    cfg, workers = read_training_config(config, open_sora, data_path), Workers.started()
    count = _encode(cfg, _build(cfg.dataset, "DATASETS"), out, workers, progress)
    if workers.rank == 0:
        write_latent_sizes(out, _latent_sizes(cfg.bucket_config, _build(cfg.vae, "MODELS")))
    return count


def store(
    config: Path,
    out: Path,
    chains: int | None,
    progress: Progress,
    open_sora: Path | None = None,
    data_path: Path | None = None,
    first_window: int = 0,
) -> int:
    """Solve chains until the folder `out` has `chains` of them (None: one a row of the data set); how many there are.

    The captions' embeddings are kept in `out`/text, unless the config's text encoder is such a folder already.

    Args:
        first_window: Further solutions of the first window, for each chain.

    Raises:
        ValueError: see `read_training_config`; a recipe whose chains no store has, or a folder of other chains.
    """
    cfg, workers = read_training_config(config, open_sora, data_path), Workers.started()
    return main(cfg, out, chains, workers, progress, first_window)


def main(cfg: Any, out: Path, chains: int | None, workers: Workers, progress: Progress, first_window: int = 0) -> int:
    """`store`, as a script's main(): whatever asks for the running script's config finds `cfg` here."""
    scheduler = PeRFlow(**{name: value for name, value in cfg.scheduler.items() if name != "type"})
    _check_recipe(scheduler)
    dataset = _build(cfg.dataset, "DATASETS")
    if cfg.text_encoder.type != "perflow_encoded":
        _encode(cfg, dataset, out / "text", workers, progress)
    folder = cfg.text_encoder.folder if cfg.text_encoder.type == "perflow_encoded" else out / "text"
    text = EncodedText(folder, workers.device, _dtype(cfg))
    vae = _build(cfg.vae, "MODELS")
    solver = ChainSolver(scheduler, _network(cfg, text, vae, workers), text, int(cfg.get("seed", 1024)), _dtype(cfg))
    solver.origin = replace(solver.origin, further=first_window)
    plan = {"captions": text_digest(map(str, dataset.data["text"])), "buckets": _plain(cfg.bucket_config)}
    writer = ChainWriter(out, solver.origin, workers.rank, **plan)
    wanted, first = len(dataset) if chains is None else chains, 0
    done = progress(wanted, "chains")
    parts = enumerate(planned(dataset, cfg.bucket_config, vae, solver.origin))
    while first < wanted:
        number, part = next(parts)
        if number % workers.world == workers.rank and not writer.shards.is_there(number):
            solved = zip(*map(_reporting(done), solver.solve(part, first)))
            ends, scales, further = (None if batches[0] is None else torch.cat(batches) for batches in solved)
            writer.write(number, first, ends, part.captions, part.told, scales, further)
        else:
            done(len(part.captions))
        first += len(part.captions)
    workers.barrier()
    return first


def read_training_config(config: Path, open_sora: Path | None, data_path: Path | None) -> Any:
    """A training config, with Open-Sora imported and the config's own imports done.

    Raises:
        ValueError: no Open-Sora 1.x, a config without a section that is needed, or another scheduler than perflow.
    """
    use_checkout(open_sora, "1.x")
    portable.activate()
    try:
        import opensora.datasets
        import opensora.models  # noqa: F401
    except ImportError as error:
        raise ValueError(f"Open-Sora 1.2 or 1.3 cannot be imported ({error}); name its checkout: --open-sora ROOT") from error
    from mmengine import Config

    found = Config.fromfile(config)
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
    kind = {"type": settings["type"], "from_pretrained": settings.get("from_pretrained"), "dtype": str(_dtype(cfg))}
    if are_encoded(out, captions, kind):  # no text encoder of 19 GB is loaded to find nothing to do
        workers.barrier()
        return 0
    encoder = _build(settings, "MODELS", device=workers.device, dtype=_dtype(cfg))
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


def _check_recipe(scheduler: PeRFlow) -> None:
    recipe = scheduler.recipe
    if recipe.teacher.stored is not None:
        raise ValueError("the config trains from a store (teacher.stored); name the config of a training whose teacher solves")
    if recipe.curriculum is not None and recipe.curriculum.teacher == "previous":
        raise ValueError('curriculum.teacher="previous" teaches by students, whose paths no store has; use teacher="original"')
    Origin.of(recipe, {}, "", "", 1, "float16", 0)  # before a text encoder of 19 GB is loaded


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
    return network.to(workers.device, _dtype(cfg)).eval()


def _build(settings: Any, registry: str, **others: Any) -> Any:
    import opensora.registry as host

    return host.build_module(settings, getattr(host, registry), **others)


def _dtype(cfg: Any) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.get("dtype", "bf16"), torch.float32)


def _plain(settings: Any) -> Any:
    """A section of a config as JSON gives it back."""
    return json.loads(json.dumps(settings.to_dict() if hasattr(settings, "to_dict") else settings))


def _reporting(done: Callable[[int], Any]) -> Callable[[Any], Any]:
    def report(solved: Any) -> Any:
        done(len(solved[0]))
        return solved

    return report
