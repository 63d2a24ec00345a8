"""Small stand-ins for Open-Sora's network, VAE and text encoder, so that its real scripts run on a laptop.

Importing this module registers "perflow_tiny_stdit3" (Open-Sora 1.2, 1.3), "perflow_tiny_stdit2" (1.1),
"perflow_tiny_stdit" (1.0), "perflow_tiny_vae" and "perflow_tiny_text" in the host's MODELS. A config names them like the
host's own:

    custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.tiny"], allow_failed_imports=False)
    model = dict(type="perflow_tiny_stdit3", from_pretrained="perflow_tiny_teacher", depth=3, input_sq_size=1536)
    vae = dict(type="perflow_tiny_vae", shrink=3)
    text_encoder = dict(type="perflow_tiny_text")

The networks are the host's own classes in other sizes; the host's factories fix depth and width (STDiT3-XL/2 is 1.1 B
parameters). VAE and text encoder are the demo's, which the host calls in ways explained there.

"perflow_tiny_teacher" names the demo's teacher, which was trained on clips of 64 x 64 pixels. The smallest bucket of the host
has 192 x 192. With the settings above such clips reach the network as latents of 8 x 8, at the positions of its training.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_perflow.checkpoints import misfits
from opensora_perflow.hosts.v1.weights import read_weights
from opensora_perflow.worlds.codec import TinyVAE
from opensora_perflow.worlds.text import TinyTextEncoder

try:
    from opensora.registry import MODELS
except ImportError as error:
    raise ImportError(
        "opensora_perflow.hosts.tiny registers stand-ins in Open-Sora's MODELS, and the package `opensora` could not "
        f"be imported ({error}); run the script through `python -m opensora_perflow.run ROOT/scripts/...`, or put the "
        "checkout of hpcaitech/Open-Sora on PYTHONPATH"
    ) from error

logger = logging.getLogger(__name__)


@MODELS.register_module("perflow_tiny_stdit3")
def tiny_stdit3(from_pretrained: str | os.PathLike | None = None, **settings: Any) -> nn.Module:
    """The host's STDiT3 in any size; the defaults give 0.7 M parameters.

    Args:
        from_pretrained: None for random weights, "perflow_tiny_teacher", or what `checkpoints.read_state_dict` takes: a
            checkpoint folder of train.py, a .safetensors file or a .pt file.
        settings: hidden_size (96), divisible by 4 and by num_heads. num_heads (4); hidden_size / num_heads is even, for the
            rotary embedding. depth (2), pairs of one spatial and one temporal block. Everything else STDiT3Config knows; the
            host's scripts pass input_size, in_channels, caption_channels, model_max_length and enable_sequence_parallelism.

    Raises:
        ValueError: sizes that do not divide, or weights that do not fit this network (the message lists the first few).
        ImportError: this Open-Sora has no STDiT3 (1.0 and 1.1 have not).
    """
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    return _load(STDiT3(STDiT3Config(**_sized(**settings))), from_pretrained)


@MODELS.register_module("perflow_tiny_stdit2")
def tiny_stdit2(from_pretrained: str | os.PathLike | None = None, **settings: Any) -> nn.Module:
    """Open-Sora 1.1's STDiT2 in any size; arguments and errors as `tiny_stdit3`."""
    from opensora.models.stdit.stdit2 import STDiT2, STDiT2Config

    return _load(STDiT2(STDiT2Config(**_sized(**settings))), from_pretrained)


@MODELS.register_module("perflow_tiny_stdit")
def tiny_stdit(from_pretrained: str | os.PathLike | None = None, **settings: Any) -> nn.Module:
    """Open-Sora 1.0's STDiT in any size; arguments and errors as `tiny_stdit3`. It is made for one video size."""
    from opensora.models.stdit.stdit import STDiT

    return _load(STDiT(**_sized(**settings)), from_pretrained)


def _sized(hidden_size: int = 96, depth: int = 2, num_heads: int = 4, **others: Any) -> dict[str, Any]:
    if hidden_size % 4 or hidden_size % (2 * num_heads) or depth < 1:
        raise ValueError(
            "a tiny network takes hidden_size divisible by 4 and by 2 * num_heads, and depth >= 1, got "
            f"hidden_size={hidden_size}, num_heads={num_heads}, depth={depth}; the defaults are 96, 4 and 2"
        )
    return {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": (1, 2, 2), **others}


def _load(network: nn.Module, source: str | os.PathLike | None) -> nn.Module:
    """Load all weights or refuse: the host's own loader goes on with whatever was missing (utils/ckpt_utils.py)."""
    if source is None:
        return network
    state = read_weights(source, network)
    problems = misfits(state, network)
    if problems is not None:
        raise ValueError(
            f"the weights in {str(source)!r} do not fit this network: {problems}; give hidden_size, depth, num_heads and the "
            "text encoder the values of the run that wrote them"
        )
    network.load_state_dict(state)
    logger.info("%s: loaded %d tensors from %s", type(network).__name__, len(state), source)
    return network


@MODELS.register_module("perflow_tiny_vae")
class HostVAE(TinyVAE):
    """The demo's video codec as the host's VAE.

    Args:
        pretrained: Whether to load the weights shipped with the demo.
        shrink: Pixels of the video in one of the codec's, along each side, >= 1: encoding averages them, decoding spreads
            them. Sides are cut to a multiple of 8 * shrink.
        from_pretrained, kwargs: Taken and ignored, so that a config needs to change `type` alone. They mean nothing here (micro
            batches, tiles).
    """

    # v1.3's collect_references_batch (utils/inference_utils.py:184-189) cuts a reference to a length its VAE takes. By
    # the rule for pieces that do not overlap, an image (1 frame) would be cut to 0 // 17 * 17 = no frame at all.
    temporal_overlap = True

    def __init__(self, pretrained: bool = True, shrink: int = 1, from_pretrained: str | None = None, **kwargs: Any) -> None:
        if not isinstance(shrink, int) or shrink < 1:
            raise ValueError(f"shrink must be a whole number of pixels >= 1, got {shrink!r}")
        super().__init__(pretrained=pretrained)
        self.shrink = shrink

    def get_latent_size(self, input_size: Sequence[int | None]) -> list[int | None]:
        """As TinyVAE.get_latent_size, after `shrink`."""
        num_frames, *sides = input_size
        return super().get_latent_size([num_frames, *(side if side is None else side // self.shrink for side in sides)])

    def encode(self, x: Tensor) -> Tensor:
        """As TinyVAE.encode, after `shrink`."""
        if self.shrink > 1:  # in float32: a CPU averages no bfloat16 here
            x = F.avg_pool3d(x.float(), (1, self.shrink, self.shrink)).to(x.dtype)
        return super().encode(x)

    def decode(self, z: Tensor, num_frames: int | None = None, **kwargs: Any) -> Tensor:
        """As TinyVAE.decode; the host may name a length that the latents do not have, and then gets theirs.

        After cutting its latents to a multiple of five, v1.3 passes t_cut * 17 // 5 (scripts/inference.py:356-358);
        v1.2.0 passes the config's num_frames for every loop.
        """
        num_latent_frames = z.shape[-3]
        if num_frames is not None and self.get_latent_size([num_frames, None, None])[0] != num_latent_frames:
            num_frames = None
        if z.ndim == 4:  # v1.3 decodes one sample without a batch axis
            return self.decode(z[None], num_frames)[0]
        video = super().decode(z, num_frames)
        return video if self.shrink == 1 else F.interpolate(video, scale_factor=(1, self.shrink, self.shrink))


@MODELS.register_module("perflow_tiny_text")
class HostTextEncoder(TinyTextEncoder):
    """The demo's text encoder as the host's T5.

    Args:
        from_pretrained, kwargs: Taken and ignored, as in HostVAE (T5's cache_dir, shardformer, local_files_only).
        Others: as TinyTextEncoder.
    """

    def __init__(
        self,
        from_pretrained: str | None = None,
        model_max_length: int = 10,
        output_dim: int = 32,
        device: Any = "cpu",
        dtype: Any = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_max_length, output_dim, device, torch.float32 if dtype is None else dtype, seed)
