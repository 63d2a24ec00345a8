"""A training as a config describes it, without weights: what is built, and in which shapes it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from opensora_perflow.training.recipe import Recipe


@dataclass(frozen=True)
class Bucket:
    """Videos of one size. name: In words. batch: Samples a GPU and step. latent: C, T, H, W of a sample."""

    name: str
    batch: int
    pixels: tuple[int, int, int]
    """Frames, height, width."""
    latent: tuple[int, int, int, int]


@dataclass(frozen=True)
class Outline:
    """A training.

    network: On the meta device, in its dtype, in training mode, with adapters where they are trained.
    encoders: Text encoder, VAE and so on, by name. buckets: Of the config.
    forward: One evaluation of the network for a bucket and so many samples. encode: Its VAE's work for a bucket.
    recipe: PeRFlow's keys; None: the host's own training.
    """

    network: nn.Module
    encoders: Mapping[str, nn.Module]
    buckets: Sequence[Bucket]
    forward: Callable[[Bucket, int], Tensor]
    encode: Callable[[Bucket], object] | None
    recipe: Recipe | None
    adapters: bool
    """Is a frozen network trained by adapters, and its own teacher?"""
    checkpointing: bool
    """Does the config checkpoint gradients?"""
    rows_together: bool
    """Are the times of a solution rows of one evaluation (2.0), or evaluations of their own?"""
    ema_on_gpu: bool
    """Has each GPU a share of a float32 average?"""
    sharded_gradients: bool
    """Does each GPU hold a share of the gradients alone (ZeRO-2)?"""
    sequence_parallel: int
    """GPUs that share one sample."""
    tflops: float
    """TFLOP/s that an H200 reached with such a network in bf16, see benchmarks/README.md."""
