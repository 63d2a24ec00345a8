"""A tiny spatio-temporal diffusion transformer that answers the calls of Open-Sora's STDiT3 and shares its state dict.

Written from the architecture (STDiT3 of Open-Sora 1.2/1.3: PixArt-style blocks that alternate attention inside a frame
and attention along time, text by cross-attention, adaLN-single modulation). Parameter names and shapes are the host's,
so one safetensors file loads into this class and into the real STDiT3; tests/host/test_demo_model_parity.py compares
both.

Sizes: a token is one latent patch, x [B, C, T, H, W] becomes tokens [B, T, S, hidden] with S = (H/2) (W/2).
Convention of the output (the host's, see conventions.py): the first C channels are data - noise, *minus* dx/dt.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

logger = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights" / "teacher.safetensors"
_FREQUENCY_CHANNELS = 256


def load_teacher(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> TinySTDiT:
    """The shipped teacher: `TinySTDiT()` of the default sizes with its weights, in eval mode.

    Raises:
        ValueError: the weights are missing or do not fit.
    """
    return TinySTDiT(from_pretrained=WEIGHTS).to(device, dtype).eval()


class TinySTDiT(nn.Module):
    """STDiT3 in small. The default sizes are those of the shipped teacher.

    Args:
        in_channels: C of the latents. The output has 2 C channels as in the host (`pred_sigma`); the second half is not
            trained by rectified flow.
        hidden_size: A multiple of 4 and of 2 * num_heads.
        depth: Pairs of one spatial and one temporal block.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the MLPs over hidden_size.
        caption_channels, model_max_length: D and L of the text encoder.
        class_dropout_prob: Chance that a sample's text becomes the null text in train mode, 0..1.
        patch_size: (1, height, width) of a token in latent pixels.
        input_sq_size: Side in pixels at which neighbouring tokens are one unit of position apart.
        qk_norm: RMS-normalise queries and keys.
        from_pretrained: safetensors file to load, or None for random weights.

    Raises:
        ValueError: sizes that do not divide, or a file that is missing or does not fit.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        hidden_size: int = 96,
        depth: int = 3,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        caption_channels: int = 32,
        model_max_length: int = 10,
        class_dropout_prob: float = 0.1,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        input_sq_size: int = 512,
        qk_norm: bool = True,
        from_pretrained: str | Path | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % 4 or hidden_size % (2 * num_heads) or patch_size[0] != 1:
            raise ValueError(
                f"hidden_size must be a multiple of 4 and of 2 * num_heads, and patch_size[0] must be 1, got "
                f"hidden_size={hidden_size}, num_heads={num_heads}, patch_size={tuple(patch_size)}; the shipped "
                "teacher has 96, 4 and (1, 2, 2)"
            )
        self.config = {
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "caption_channels": caption_channels,
            "model_max_length": model_max_length,
            "class_dropout_prob": class_dropout_prob,
            "patch_size": tuple(patch_size),
            "input_sq_size": input_sq_size,
            "qk_norm": qk_norm,
            "pred_sigma": True,
        }
        """Keywords of the host's STDiT3Config that describe this network (v1.2.0 and v1.3 know them all)."""
        self.patch_size, self.input_sq_size = tuple(patch_size), input_sq_size

        self.rope = _RotaryFrequencies(hidden_size // num_heads)
        self.x_embedder = _PatchEmbedder(self.patch_size, in_channels, hidden_size)
        self.t_embedder = _ScalarEmbedder(hidden_size)
        self.fps_embedder = _ScalarEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = _CaptionEmbedder(caption_channels, hidden_size, class_dropout_prob, model_max_length)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(_Block(hidden_size, num_heads, mlp_ratio, qk_norm, temporal) for _ in range(depth))
            for temporal in (False, True)
        )
        self.final_layer = _FinalLayer(hidden_size, math.prod(self.patch_size), 2 * in_channels)
        self._initialize()
        if from_pretrained is not None:
            self._load(Path(from_pretrained))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Velocity of the latents, in the host's sign (data - noise).

        Args:
            x: Latents [B, C, T, H, W], any T, H, W; odd sides are padded inside.
            timestep: [B], 0 (data) .. 1000 (noise); not rounded to the weights' dtype (as v1.3; v1.2 rounds).
            y: Word vectors [B, 1, L, D].
            mask: 0/1 [B or a divisor of B, L]. Fewer rows are tiled: a guided batch is [cond..., uncond...], and the null text
                is cut to its prompt's length. None: every token counts.
            x_mask: bool [B, T]; False marks a frame that is given, which is modulated as at timestep 0.
            fps: Frames per second, [B or a divisor of B].
            height, width: Of the video in pixels; the first entry sets the spatial scale for the whole batch.
            **kwargs: What else the host's scripts hand over (num_frames, ar, ...) is ignored, as in STDiT3.

        Returns:
            float32 [B, 2 C, T, H, W].

        Raises:
            ValueError: fps, height or width missing; a mask that cannot be tiled or has a row without a token; in train mode, a
                y whose L, D are not the null text's.
        """
        if fps is None or height is None or width is None:
            sizes = {"fps": fps, "height": height, "width": width}
            missing = [name for name, value in sizes.items() if value is None]
            raise ValueError(f"fps, height and width [B] are needed, got None for {missing}; pass them as the host does")
        dtype = self.x_embedder.proj.weight.dtype
        batch, _, num_frames, rows, columns = x.shape

        text, text_mask = self._encode_text(y.to(dtype), mask)
        # one vector a sample, and the same at timestep 0 for given frames
        fps_vector = self.fps_embedder(fps.flatten(), dtype)
        fps_vector = fps_vector.repeat(batch // len(fps_vector), 1)
        t_vector = self.t_embedder(timestep, dtype) + fps_vector
        t_vectors = [t_vector]
        if x_mask is not None:
            t_vectors.append(self.t_embedder(torch.zeros_like(timestep), dtype) + fps_vector)
        modulations = [self.t_block(vector).unflatten(1, (6, -1)) for vector in t_vectors]  # [B, 6, hidden] each
        given = None if x_mask is None else ~x_mask.bool()

        tokens = self.x_embedder(x.to(dtype))  # [B, T, h, w, hidden]
        token_rows, token_columns = tokens.shape[2:4]
        scale = math.sqrt(height.flatten()[0].item() * width.flatten()[0].item()) / self.input_sq_size
        position = _position_embedding(tokens.shape[-1], token_rows, token_columns, scale, x.device).to(dtype)
        tokens = tokens.flatten(2, 3) + position
        rotation = self.rope(num_frames)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks):
            tokens = spatial(tokens, text, text_mask, modulations, given, None)
            tokens = temporal(tokens, text, text_mask, modulations, given, rotation)
        tokens = self.final_layer(tokens, t_vectors, given)  # [B, T, S, ph pw 2C]
        _, ph, pw = self.patch_size
        out = rearrange(tokens, "b t (h w) (ph pw c) -> b c t (h ph) (w pw)", h=token_rows, ph=ph, pw=pw)
        return out[..., :rows, :columns].float()

    def _encode_text(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(text tokens [B, L, hidden], bool [B, 1, 1, L] True = token, or None)."""
        text = self.y_embedder(y, self.training).squeeze(1)
        if mask is None:
            return text, None
        mask = mask.reshape(-1, mask.shape[-1]) != 0
        if text.shape[0] % mask.shape[0] or mask.shape[1] != text.shape[1] or not bool(mask.any(dim=1).all()):
            raise ValueError(
                f"mask must be [B or a divisor of B, L] with a token in each row for y of {list(y.shape)}, got "
                f"{list(mask.shape)} with {mask.sum(dim=1).tolist()} tokens; pass the text encoder's own mask"
            )
        return text, mask.repeat(text.shape[0] // mask.shape[0], 1)[:, None, None]

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.fps_embedder.mlp[2].weight)
        for block in self.temporal_blocks:  # temporal blocks start as the identity, like the host's
            for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def _load(self, path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise ValueError(
                f"from_pretrained must be a safetensors file, got {path}, which is not there; make one with "
                "`python benchmarks/train_teacher.py`"
            )
        try:
            self.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} does not fit TinySTDiT({self.config}): {error}; pass its own sizes") from error


def _position_embedding(hidden_size: int, rows: int, columns: int, scale: float, device: torch.device) -> Tensor:
    """Sine-cosine embedding [rows * columns, hidden]: first half of the channels for the column, second for the row."""
    base = round(math.sqrt(rows * columns))
    half = hidden_size // 2
    frequencies = 10000.0 ** -(torch.arange(0, half, 2, device=device).float() / half)

    def axis(size: int) -> Tensor:
        place = torch.arange(size, device=device) / scale * (base / size)
        angle = place[:, None] * frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    by_column = axis(columns)[None].expand(rows, -1, -1)
    by_row = axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1)


def _select(given: Tensor | None, versions: list[Tensor]) -> Tensor:
    """Tokens [B, T, S, hidden]: versions[1] (timestep 0) in frames marked in `given` [B, T], versions[0] elsewhere."""
    return versions[0] if given is None else torch.where(given[:, :, None, None], versions[1], versions[0])


class _RotaryFrequencies(nn.Module):
    """Rotary embedding of the frame number on neighbouring channel pairs; `freqs` [head_dim / 2] is never trained."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        freqs = 10000.0 ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        self.freqs = nn.Parameter(freqs, requires_grad=False)

    def forward(self, num_frames: int) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, head_dim / 2] each."""
        angle = torch.arange(num_frames, device=self.freqs.device)[:, None] * self.freqs
        return angle.cos(), angle.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs (0, 1), (2, 3), ... of x [..., T, head_dim]."""
    cos, sin = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention [..., N, d] x [..., L, d]; mask bool, True = may be looked at.

    Written out: for 5 to 80 tokens two matrix products are two to five times faster on a CPU than torch's fused kernel.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.float().softmax(dim=-1).to(v.dtype) @ v


class _PatchEmbedder(nn.Module):
    def __init__(self, patch_size: tuple[int, ...], in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, T, ceil(H / ph), ceil(W / pw), hidden]."""
        _, ph, pw = self.patch_size
        x = F.pad(x, (0, -x.shape[-1] % pw, 0, -x.shape[-2] % ph))
        # patches do not overlap, so the convolution is one matrix product, which is much faster on a CPU
        x = rearrange(x, "b c t (h ph) (w pw) -> b t h w (c ph pw)", ph=ph, pw=pw)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class _ScalarEmbedder(nn.Module):
    """One number a sample -> a vector, through sines and cosines and a small MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCY_CHANNELS, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        half = _FREQUENCY_CHANNELS // 2
        frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=value.device).float())
        angle = value.float()[:, None] * frequencies
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype))


def _mlp(in_features: int, hidden_features: int, out_features: int) -> nn.Sequential:
    layers = {"fc1": nn.Linear(in_features, hidden_features), "act": nn.GELU("tanh")}
    return nn.Sequential(OrderedDict(**layers, fc2=nn.Linear(hidden_features, out_features)))


class _CaptionEmbedder(nn.Module):
    def __init__(self, caption_channels: int, hidden_size: int, uncond_prob: float, num_tokens: int) -> None:
        super().__init__()
        self.y_proj = _mlp(caption_channels, hidden_size, hidden_size)
        # a buffer, as in the host: the null text is loaded, never trained
        self.register_buffer("y_embedding", torch.randn(num_tokens, caption_channels) / caption_channels**0.5)
        self.uncond_prob = uncond_prob

    def forward(self, y: Tensor, train: bool) -> Tensor:
        if train:
            if y.shape[2:] != self.y_embedding.shape:
                raise ValueError(
                    f"in train mode y must be [B, 1, {', '.join(map(str, self.y_embedding.shape))}], got "
                    f"{list(y.shape)}; pad the text to the model's model_max_length"
                )
            if self.uncond_prob > 0:
                # drawn on the CPU like the host's, so that a seed drops the same samples on every device
                drop = torch.rand(y.shape[0]).to(y.device) < self.uncond_prob
                y = torch.where(drop[:, None, None, None], self.y_embedding.to(y.dtype), y)
        return self.y_proj(y)


class _RMSNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class _SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = _RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.k_norm = _RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Attention over the last but one axis of x [..., N, hidden]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(-2, -4).unbind(-2)  # [..., heads, N, d]
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = _rotate(q, rotation), _rotate(k, rotation)
        q, k, v = (part.flatten(0, -4) for part in (q, k, v))
        out = _attend(q, k, v)
        return self.proj(out.transpose(-3, -2).flatten(-2).view(x.shape))


class _CrossAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        """x [B, T, S, hidden] looks at text [B, L, hidden]."""
        q = rearrange(self.q_linear(x), "b t s (heads d) -> b heads (t s) d", heads=self.num_heads)
        k, v = rearrange(self.kv_linear(text), "b l (kv heads d) -> kv b heads l d", kv=2, heads=self.num_heads)
        out = _attend(q, k, v, text_mask)
        return self.proj(rearrange(out, "b heads (t s) d -> b t s (heads d)", t=x.shape[1]))


class _Block(nn.Module):
    """Self-attention (inside each frame, or along time at each place), cross-attention to the text, MLP."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.attn = _SelfAttention(hidden_size, num_heads, qk_norm)
        self.cross_attn = _CrossAttention(hidden_size, num_heads)
        self.mlp = _mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        modulations: list[Tensor],
        given: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """x [B, T, S, hidden]; modulations [B, 6, hidden] at t and, if frames are given, at timestep 0."""
        # for each modulation six vectors [B, 1, 1, hidden]: shift, scale and gate of the attention, then of the MLP
        tables = [(self.scale_shift_table + m)[:, :, None, None].unbind(1) for m in modulations]

        def modulated(value: Tensor, shift: int, scale: int) -> Tensor:
            normed = F.layer_norm(value, value.shape[-1:], eps=1e-6)
            return _select(given, [normed * (1 + table[scale]) + table[shift] for table in tables])

        def gated(value: Tensor, gate: int) -> Tensor:
            return _select(given, [table[gate] * value for table in tables])

        inner = modulated(x, 0, 1)
        if self.temporal:
            inner = self.attn(inner.transpose(1, 2).contiguous(), rotation).transpose(1, 2)
        else:
            inner = self.attn(inner, None)
        x = x + gated(inner, 2)
        x = x + self.cross_attn(x, text, text_mask)
        return x + gated(self.mlp(modulated(x, 3, 4)), 5)


class _FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_volume: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_volume * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(self, x: Tensor, t_vectors: list[Tensor], given: Tensor | None) -> Tensor:
        def modulated(value: Tensor, t_vector: Tensor) -> Tensor:
            shift, scale = (self.scale_shift_table + t_vector[:, None])[:, :, None, None].unbind(1)
            return F.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale) + shift

        versions = [modulated(x, t_vectors[0])]
        if given is not None:
            # host quirk, kept for equal outputs: given frames are modulated twice. T2IFinalLayer (v1.2.0 blocks.py) overwrites
            # x before the timestep-0 branch reads it. Samplers put those frames back, so it never shows.
            versions.append(modulated(versions[0], t_vectors[1]))
        return self.linear(_select(given, versions))
