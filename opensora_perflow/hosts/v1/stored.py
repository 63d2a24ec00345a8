"""For Open-Sora 1.2 and 1.3: stored chains as a training set, encoded captions as a text encoder, latents in place of a VAE."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from opensora.datasets.datasets import VariableVideoTextDataset
from opensora.registry import DATASETS, MODELS
from torch import nn

from opensora_perflow.checks import check_num_steps
from opensora_perflow.hosts.chains import CHAIN, Passes, chain_at, pass_begins, training_store, whole_buckets
from opensora_perflow.hosts.script import running_config
from opensora_perflow.hosts.v1.encoded_text import EncodedText
from opensora_perflow.hosts.v1.stored_chains import WHERE, chain_bytes

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
        if config and not config.get("load_video_features"):
            raise ValueError("perflow_stored gives latents, not videos; set load_video_features=True in the config")
        self.store, self.tokenize_fn = training_store(data_path, named, WHERE), tokenize_fn
        if config.get("bucket_config"):
            config["bucket_config"] = whole_buckets(config["bucket_config"], self.store)
        self._passes = Passes(self.store)
        self._data = self._table()
        self.num_frames, self.frame_interval, self.image_size, self.bucket_class = None, 1, (None, None), "Bucket"

    @property
    def data(self) -> pd.DataFrame:
        """The table of this pass. The host's sampler, which begins one in all processes, gets chains that were added since."""
        if pass_begins() and self._passes.next():
            self._data = self._table()
        return self._data

    def __len__(self) -> int:
        return len(self._data)

    def _table(self) -> pd.DataFrame:
        told = [told for _, told in self._passes.chains]
        # The host's buckets take videos that are longer than they are.
        frames = [one["num_frames"] + (one["num_frames"] > 1) for one in told]
        sizes = {name: [one[name] for one in told] for name in ("height", "width")}
        return pd.DataFrame({"num_frames": frames, **sizes, "id": range(len(told))})

    def getitem(self, index: str) -> dict[str, Any]:
        """The sample "row-frames-height-width" of the host's buckets; errors as chain_at."""
        chain, told = chain_at(self.store, index)
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
