"""For Open-Sora 2.0: stored chains as a training set."""

from typing import Any

import pandas as pd
import torch
from opensora.datasets.datasets import VideoTextDataset
from opensora.registry import DATASETS
from torch.utils.data import Dataset

from opensora_perflow.hosts.chains import CHAIN, Passes, chain_at, training_store, whole_buckets
from opensora_perflow.hosts.script import running_config
from opensora_perflow.hosts.v2.stored_chains import WHERE


@DATASETS.register_module("perflow_stored")
class StoredChains(VideoTextDataset):
    """The chains of a store: texts, sizes and the chains' numbers, with zeros for latents.

    The shares of `bucket_config` were drawn when the store was written: in training each bucket takes all of its chains.

    Args:
        data_path: The store; None: the one that perflow.teacher.stored names.

    Raises:
        ValueError: no store, or another one than the recipe's; see store.ChainStore.
    """

    def __init__(self, data_path: str | None = None) -> None:
        Dataset.__init__(self)  # the host's own reads a table of videos
        config = running_config() or {}
        teacher = ((config.get("model") or {}).get("perflow") or {}).get("teacher") or {}
        self.store = training_store(data_path, teacher.get("stored"), WHERE)
        if config.get("bucket_config"):
            config["bucket_config"] = whole_buckets(config["bucket_config"], self.store)
        self._passes = Passes(self.store)
        self._data = self._table()
        self.fps_max, self.bucket_class, self.memory_efficient = 24, "Bucket", False

    @property
    def data(self) -> pd.DataFrame:
        """The table, as the host's sampler asks for it at each pass, in its first process: with chains added meanwhile."""
        if self._passes.next(alone=True):
            self._data = self._table()
        return self._data

    def __len__(self) -> int:
        return len(self._data)

    def _table(self) -> pd.DataFrame:
        sizes = {name: [one[name] for _, one in self._passes.chains] for name in ("num_frames", "height", "width")}
        return pd.DataFrame({**sizes, "fps": float("nan"), "path": ""})  # no frame is left out

    def getitem(self, index: str) -> dict[str, Any]:
        """The sample "row-frames-height-width" of the host's buckets; errors as chain_at."""
        chain, _ = chain_at(self.store, index)
        latents = torch.zeros(self.store.latent_shape(torch.tensor([chain])))
        # With cached_video, train.py takes latents, and of the video the number of samples.
        return {"video": torch.zeros(1), "video_latents": latents, "text": self.store.caption(chain), CHAIN: chain}
