"""Training from files alone: stored chains as a training set, encoded captions as a text encoder, latents in place of a VAE.

Importing this module registers "perflow_stored" in the host's DATASETS, and "perflow_encoded" and "perflow_latents" in its
MODELS (Open-Sora 1.2 and 1.3). `opensora-perflow store` and `encode` write the files.

    custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.stored"], allow_failed_imports=False)
    scheduler = dict(type="perflow", teacher=dict(stored="store"), guidance=dict(mode="fixed", scale=7.0), ...)
    dataset = dict(type="perflow_stored")
    text_encoder = dict(type="perflow_encoded", folder="store/text")
    vae = dict(type="perflow_latents", out_channels=4)
    load_video_features = True
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora_perflow.checks import check_num_steps
from opensora_perflow.hosts.script import running_config
from opensora_perflow.hosts.v1.encoded_text import EncodedText
from opensora_perflow.hosts.v1.stored_chains import CHAIN, chain_bytes
from opensora_perflow.training.store import ChainStore

try:
    import pandas as pd
    from opensora.datasets.datasets import VariableVideoTextDataset
    from opensora.registry import DATASETS, MODELS
except ImportError as error:
    raise ImportError(
        "opensora_perflow.hosts.stored registers a training set in Open-Sora's DATASETS, and the package `opensora` could not "
        f"be imported ({error}); run the script through `python -m opensora_perflow.run ROOT/scripts/train.py`, or put the "
        "checkout of hpcaitech/Open-Sora on PYTHONPATH"
    ) from error

logger = logging.getLogger("opensora_perflow")

MODELS.register_module("perflow_encoded", module=EncodedText)


@MODELS.register_module("perflow_latents")
class Latents(nn.Module):
    """In place of a VAE where the training set gives latents: what train.py asks a VAE for besides.

    Args:
        out_channels: Of the latents: 4 in Open-Sora 1.2, 16 in 1.3.
        others: Taken and ignored, as other VAEs' settings in a config that changes `type` alone.
    """

    def __init__(self, out_channels: int = 4, **others: Any) -> None:
        super().__init__()
        check_num_steps(out_channels, "out_channels of perflow_latents")
        self.out_channels = out_channels

    def get_latent_size(self, input_size: Sequence[int | None]) -> list[int | None]:
        """The size itself, which is that of latents."""
        return list(input_size)


@DATASETS.register_module("perflow_stored")
class StoredChains(VariableVideoTextDataset):
    """The chains of a store: captions, sizes and the chains' numbers, with zeros for latents.

    The shares of `bucket_config` were drawn when the store was written: in training each bucket takes all of its chains.

    Args:
        data_path: The store; None: the one that scheduler.teacher.stored names.
        tokenize_fn: v1.3 passes its text encoder's.

    Raises:
        ValueError: no store, or another one than the scheduler's; see store.ChainStore.
    """

    def __init__(self, data_path: str | None = None, tokenize_fn: Callable[..., Any] | None = None) -> None:
        config = running_config() or {}
        named = ((config.get("scheduler") or {}).get("teacher") or {}).get("stored")
        folder = named if data_path is None else data_path
        if folder is None or (named is not None and Path(folder).resolve() != Path(named).resolve()):
            raise ValueError(
                f"perflow_stored takes the store that scheduler=dict(teacher=dict(stored=DIR)) names, got {named!r} there and "
                f"data_path={data_path!r}; name one store"
            )
        if config and not config.get("load_video_features"):
            raise ValueError("perflow_stored gives latents, not videos; set load_video_features=True in the config")
        self.store, self.tokenize_fn = ChainStore(folder), tokenize_fn
        if config.get("bucket_config"):
            config["bucket_config"] = _whole_buckets(config["bucket_config"], self.store)
        told = [told for _, told in self.store.chains]
        # The host's buckets take videos that are longer than they are.
        frames = [one["num_frames"] + (one["num_frames"] > 1) for one in told]
        self.data = pd.DataFrame(
            {"num_frames": frames, "height": [one["height"] for one in told], "width": [one["width"] for one in told]}
        )
        self.data["id"] = range(len(told))
        self.num_frames, self.frame_interval, self.image_size, self.bucket_class = None, 1, (None, None), "Bucket"

    def getitem(self, index: str) -> dict[str, Any]:
        """The sample "row-frames-height-width" of the host's buckets.

        Raises:
            ValueError: a bucket of another size than the chain's.
        """
        row, *size = (int(value) for value in index.split("-"))
        chain, told = self.store.chains[row]
        if size != [told["num_frames"], told["height"], told["width"]]:
            raise ValueError(
                f"a chain of {told['num_frames']} frames of {told['height']} x {told['width']} came into a bucket of "
                f"{size[0]} frames of {size[1]} x {size[2]}; use the bucket_config that the store was written with"
            )
        text = self.store.caption(chain)
        sample = {
            "video": torch.zeros(self.store.latent_shape(torch.tensor([chain]))),
            "text": text,
            "path": f"chain {chain}",  # v1.3's train.py takes it out of every batch
            CHAIN: chain_bytes(chain),
            **told,
        }
        if self.tokenize_fn is not None:
            sample.update({key: value.squeeze(0) for key, value in self.tokenize_fn(text).items()})
        return sample

    def __getitem__(self, index: str) -> dict[str, Any]:
        return self.getitem(index)  # v1.3's own drops a sample that fails, and goes on

    def get_path(self, index: str) -> str:
        """What v1.3's messages call a sample."""
        return f"chain {index}"


def _whole_buckets(bucket_config: Mapping[str, Any], store: ChainStore) -> dict[str, Any]:
    """The buckets of a config with all of their chains.

    Raises:
        ValueError: they are not those that the store was written for.
    """
    here = {name: sorted(map(int, sizes)) for name, sizes in bucket_config.items()}
    there = {name: sorted(map(int, sizes)) for name, sizes in store.plan["buckets"].items()}
    if here != there:
        raise ValueError(
            f"the store {str(store.folder)!r} was written for the buckets {there} (resolution: frames), and this config's "
            f"bucket_config has {here}; use the one that the store was written with"
        )
    return {name: {frames: (1.0, one[1]) for frames, one in sizes.items()} for name, sizes in bucket_config.items()}
