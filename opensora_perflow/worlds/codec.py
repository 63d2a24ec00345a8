"""A video autoencoder of a third of a million weights that answers the calls Open-Sora makes to its VAE.

Frames are grouped in fours and each group becomes one latent frame, 8 times smaller in height and width. As in the host
(opensora/models/vae, v1.2.0) the video is cut into pieces of `micro_frame_size` = 17 frames. A piece is padded *in
front*, by repeating its first frame, to a multiple of four. 17 frames give 5 latent frames, 1 frame (an image) gives 1, 34 give
10. In general T frames give 5 * (T // 17) + ceil((T % 17) / 4).
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from opensora_perflow.worlds.clips import frames_to_tensor, make_clip

logger = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights" / "codec.safetensors"


class _Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), [N, width, h, w]; the second convolution starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class TinyVAE(nn.Module):
    """Deterministic convolutional autoencoder with the interface of Open-Sora's video VAE.

    Latents of the demo's clips have about zero mean and unit variance in each channel; they are not bounded.

    Args:
        pretrained: Load the weights shipped in worlds/weights (a warning is logged if they are missing). False leaves
            random weights: shapes are right, pictures are not.

    Raises:
        ValueError: shipped weights that do not fit this class (message names the file).
    """

    in_channels = 3
    out_channels = 4  # channels of the *latents*: the host's name for it
    spatial_factor = 8
    group_size = 4  # video frames in one latent frame
    patch_size = (4, 8, 8)
    temporal_overlap = False  # read by v1.3's collect_references_batch

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        self.micro_frame_size = 17
        wide, narrow, group_channels = 48, 32, self.group_size * self.in_channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(group_channels * 4, narrow, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(narrow, narrow, 4, stride=2, padding=1),
            _Residual(narrow),
            nn.SiLU(),
            nn.Conv2d(narrow, wide, 4, stride=2, padding=1),
            _Residual(wide),
            nn.SiLU(),
            nn.Conv2d(wide, self.out_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(self.out_channels, wide, 3, padding=1),
            _Residual(wide),
            _Residual(wide),
            nn.SiLU(),
            nn.Conv2d(wide, narrow * 4, 3, padding=1),
            nn.PixelShuffle(2),
            _Residual(narrow),
            nn.SiLU(),
            nn.Conv2d(narrow, narrow * 4, 3, padding=1),
            nn.PixelShuffle(2),
            nn.SiLU(),
            nn.Conv2d(narrow, group_channels * 4, 3, padding=1),
            nn.PixelShuffle(2),
        )
        # latents = (encoder output - shift) / scale, measured on the demo's clips after training
        self.register_buffer("latent_shift", torch.zeros(self.out_channels))
        self.register_buffer("latent_scale", torch.ones(self.out_channels))
        if pretrained:
            self._load_shipped()
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.latent_shift.device

    @property
    def dtype(self) -> torch.dtype:
        return self.latent_shift.dtype

    def get_latent_size(self, input_size: Sequence[int | None]) -> list[int | None]:
        """[T, H, W] of a video (any of them None) -> [T', H', W'] of its latents, None where the input is None."""
        num_frames, height, width = input_size
        return [
            None if num_frames is None else self._num_latent_frames(num_frames),
            None if height is None else height // self.spatial_factor,
            None if width is None else width // self.spatial_factor,
        ]

    def encode(self, x: Tensor) -> Tensor:
        """Video -> latents.

        Args:
            x: [B, 3, T, H, W] in [-1, 1], any T >= 1. Rows and columns beyond the last multiple of 8 are left out, as
                the host's strided convolutions do.

        Returns:
            [B, 4, T', H // 8, W // 8] in x's dtype; see `get_latent_size`.

        Raises:
            ValueError: not five dimensions, not three channels, no frame, or a side below 8 pixels.
        """
        if x.ndim != 5 or x.shape[1] != self.in_channels or x.shape[2] < 1 or min(x.shape[3:]) < self.spatial_factor:
            raise ValueError(
                f"encode takes a video [B, 3, T >= 1, H >= 8, W >= 8], got {list(x.shape)}; permute frames-first or "
                "channels-last videos to [B, 3, T, H, W]"
            )
        batch, _, num_frames, height, width = x.shape
        _, height, width = (size * self.spatial_factor for size in (1, height // 8, width // 8))
        index = torch.tensor(self._group_frames(num_frames), device=x.device)
        groups = x[..., :height, :width].to(self.dtype).index_select(2, index)
        latents = self.encode_groups(self.split_groups(groups))
        latents = (latents - self.latent_shift[:, None, None]) / self.latent_scale[:, None, None]
        return latents.unflatten(0, (batch, -1)).transpose(1, 2).to(x.dtype)

    def decode(self, z: Tensor, num_frames: int | None = None) -> Tensor:
        """Latents -> video.

        Args:
            z: [B, 4, T', H', W'], or one sample [4, T', H', W'] (v1.3's inference.py decodes without a batch axis).
            num_frames: Frames wanted. It must be one that encodes to T' latent frames. None: 17 frames for every five latent
                frames, and 1, 5, 9 or 13 for a rest of 1..4.

        Returns:
            [B, 3, T, 8 H', 8 W'] (or [3, T, 8 H', 8 W']) about in [-1, 1], not clamped, in z's dtype.

        Raises:
            ValueError: other dimensions or channels, no latent frame, or `num_frames` that does not fit T'.
        """
        if z.ndim == 4:
            return self.decode(z[None], num_frames)[0]
        if z.ndim != 5 or z.shape[1] != self.out_channels or z.shape[2] < 1:
            raise ValueError(
                f"decode takes latents [B, 4, T >= 1, H, W] or [4, T >= 1, H, W], got {list(z.shape)}; pass what "
                "encode returned"
            )
        batch, _, num_latent_frames = z.shape[:3]
        if num_frames is None:
            whole, rest = divmod(num_latent_frames, 5)
            num_frames = whole * self.micro_frame_size + (4 * rest - 3 if rest else 0)
        if num_frames < 1 or self._num_latent_frames(num_frames) != num_latent_frames:
            raise ValueError(
                f"num_frames={num_frames} does not belong to {num_latent_frames} latent frames: T frames give "
                "5 * (T // 17) + ceil((T % 17) / 4); leave num_frames out to get the usual length"
            )
        frames = self.decode_groups(z.to(self.dtype).transpose(1, 2).flatten(0, 1))
        frames = self.merge_groups(frames, batch)
        # a padded front frame is a repeat of the frame after it: of equal indices the last slot is the real one
        index = self._group_frames(num_frames)
        keep = [slot for slot, frame in enumerate(index) if slot + 1 == len(index) or index[slot + 1] != frame]
        return frames.index_select(2, torch.tensor(keep, device=z.device)).to(z.dtype)

    def encode_groups(self, groups: Tensor) -> Tensor:
        """Four-frame groups [N, 12, H, W] -> latents before normalisation [N, 4, H/8, W/8]."""
        return self.encoder(groups)

    def decode_groups(self, latents: Tensor) -> Tensor:
        """Normalised latents [N, 4, h, w] -> four-frame groups [N, 12, 8h, 8w]."""
        return self.decoder(latents)

    def split_groups(self, video: Tensor) -> Tensor:
        """[B, 3, 4n, H, W] -> [B n, 12, H, W], channel = colour * 4 + frame."""
        return rearrange(video, "b c (n four) h w -> (b n) (c four) h w", four=self.group_size)

    def merge_groups(self, groups: Tensor, batch: int) -> Tensor:
        """[B n, 12, H, W] -> [B, 3, 4n, H, W]; undoes `split_groups`."""
        return rearrange(groups, "(b n) (c four) h w -> b c (n four) h w", b=batch, four=self.group_size)

    def _num_latent_frames(self, num_frames: int) -> int:
        whole, rest = divmod(num_frames, self.micro_frame_size)
        return whole * 5 + -(-rest // self.group_size)

    def _group_frames(self, num_frames: int) -> list[int]:
        """Frame index of each slot of each group; the front of a piece repeats its first frame."""
        index: list[int] = []
        for start in range(0, num_frames, self.micro_frame_size):
            piece = list(range(start, min(start + self.micro_frame_size, num_frames)))
            index += [start] * (-len(piece) % self.group_size) + piece
        return index

    def _load_shipped(self) -> None:
        if not WEIGHTS.is_file():
            logger.warning(
                "demo codec weights are missing (%s): TinyVAE starts from random weights and its pictures mean "
                "nothing; make them with `python benchmarks/train_teacher.py`",
                WEIGHTS,
            )
            return
        from safetensors.torch import load_file

        try:
            self.load_state_dict(load_file(WEIGHTS))
        except RuntimeError as error:
            raise ValueError(
                f"{WEIGHTS} does not fit TinyVAE ({error}); restore the shipped file or make it again with "
                "`python benchmarks/train_teacher.py`"
            ) from error


def clip_latents(num_clips: int, progress: bool = False) -> tuple[Tensor, list[str]]:
    """Latents [N, C, T, H, W] of as many clips of moving shapes, always the same ones, and their captions."""
    rng, vae, parts, captions = np.random.default_rng(0), TinyVAE().eval(), [], []
    with torch.no_grad():
        for begin in tqdm(range(0, num_clips, 32), desc="clips for the teacher", unit="batch", disable=not progress):
            frames, texts = zip(*(make_clip(rng) for _ in range(min(32, num_clips - begin))))
            parts.append(vae.encode(frames_to_tensor(np.stack(frames))))
            captions += texts
    return torch.cat(parts), captions
