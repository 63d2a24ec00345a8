"""A small network with the call contract of Open-Sora 2.0's MMDiT, and what its train.py does around it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_perflow.hosts.v2 import text
from opensora_perflow.hosts.v2.flux import PeRFlowFlux
from opensora_perflow.hosts.v2.tokens import Layout

LAYOUT = Layout(frames=3, rows=2, columns=4, patch=2)
CHANNELS, TOKENS, WORDS, POOLED = 2, 5, 3, 4
FEATURES = 256
"""Of a timestep, of which this network has the first: where hosts/scale_input.py says a step's length, there is nothing."""
EULER = dict(teacher=dict(steps_per_window=1, solver="euler"), draws=dict(edge_mass=1.0))
"""A teacher of one Euler step a window, whose line an untrained student knows already."""


class TinyMMDiT(nn.Module):
    """Answers something smooth that depends on everything that it is told, but mostly is about the state."""

    def __init__(self, seed: int = 0, cond_embed: bool = True, guidance_embed: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(cond_embed=cond_embed, guidance_embed=guidance_embed)
        self.patch_size, self.in_channels = LAYOUT.patch, CHANNELS * LAYOUT.patch**2
        torch.manual_seed(seed)
        self.img_in, self.txt_in = nn.Linear(self.in_channels, 16), nn.Linear(WORDS, 16)
        self.vector_in, self.time_in = nn.Linear(POOLED, 16), nn.Linear(FEATURES, 16)
        self.cond_in = nn.Linear(self.in_channels + self.patch_size**2, 16) if cond_embed else nn.Identity()
        self.guidance_in = nn.Linear(1, 16) if guidance_embed else nn.Identity()
        self.out = nn.Linear(16, self.in_channels)
        self.rows: list[int] = []

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        self.rows.append(len(img))
        hidden = self.img_in(img) + self.txt_in(txt).mean(1, keepdim=True) + self.vector_in(y_vec)[:, None]
        hidden = (
            hidden + self.time_in(F.pad(timesteps[:, None], (0, FEATURES - 1)))[:, None] + img_ids.mean(2, keepdim=True) / 10
        )
        if self.config.cond_embed:
            if cond is None:
                raise ValueError("Didn't get conditional input for conditional model.")
            hidden = hidden + self.cond_in(cond)
        if self.config.guidance_embed:
            hidden = hidden + self.guidance_in(guidance[:, None])[:, None]
        return self.out(torch.tanh(hidden))


def hooked(config: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, **settings: Any):
    """A network in training mode with hooks that have a copy of it as their teacher: (network, hooks)."""
    from opensora_perflow.training.teacher import copy_frozen

    network, hooks = TinyMMDiT(**settings).to(dtype), PeRFlowFlux(config)
    hooks.host.built = copy_frozen(network)
    return hooks.attach(network.train()), hooks


class Encoder(nn.Module):
    """Answers every text with what it was given."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, text: str | list[str]) -> Tensor:
        return self.answer


def note_nulls(monkeypatch: pytest.MonkeyPatch, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The embeddings of "" as the encoders of a run leave them, in place of those of other tests."""
    monkeypatch.setattr(text, "_NULLS", {})
    generator = torch.Generator().manual_seed(9)
    nulls = {"txt": torch.randn(1, tokens, WORDS, generator=generator), "y_vec": torch.randn(1, POOLED, generator=generator)}
    for argument, answer in nulls.items():
        text.noting_null(Encoder(answer.to(dtype)), argument)("")
    return nulls


def positions(layout: Layout = LAYOUT, batch_size: int = 2) -> Tensor:
    """img_ids [B, L, 3] in the order of sampling.prepare."""
    grid = torch.meshgrid(*map(torch.arange, (layout.frames, layout.rows, layout.columns)), indexing="ij")
    return torch.stack(grid, dim=-1).reshape(1, -1, 3).float().expand(batch_size, -1, -1)


def told(batch_size: int = 2, reference: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What train.py passes of each sample; `reference`: the first frame is known."""
    generator = torch.Generator().manual_seed(3)
    length = LAYOUT.frames * LAYOUT.rows * LAYOUT.columns
    cond = torch.zeros(batch_size, length, (CHANNELS + 1) * LAYOUT.patch**2)
    if reference:
        cond[:, : LAYOUT.rows * LAYOUT.columns] = 1.0
    values = {
        "img_ids": positions(batch_size=batch_size),
        "txt": torch.randn(batch_size, TOKENS, WORDS, generator=generator),
        "txt_ids": torch.zeros(batch_size, TOKENS, 3),
        "y_vec": torch.randn(batch_size, POOLED, generator=generator),
        "cond": cond,
    }
    return {name: value.to(dtype) for name, value in values.items()}


def noised(data: Tensor, t: Tensor, sigma_min: float = 1e-5) -> tuple[Tensor, Tensor]:
    """x_t and the target of train.py:430-456, for packed data [B, L, D] and times t [B] in the network's precision."""
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(4)).to(data)
    rest = (1 - t)[:, None, None]
    return rest * data + (1 - (1 - sigma_min) * rest) * noise, (1 - sigma_min) * noise - data


def arguments(batch_size: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """The network's keywords and the target, of one step of train.py."""
    given = told(batch_size, dtype=dtype, **options)
    t = torch.linspace(0.9, 0.3, batch_size).to(dtype)
    data = torch.randn(*given["cond"].shape[:2], CHANNELS * LAYOUT.patch**2, generator=torch.Generator().manual_seed(5))
    img, target = noised(data.to(dtype), t)
    return {**given, "img": img, "timesteps": t, "guidance": torch.full_like(t, 4.0)}, target


def compare(prediction: Tensor, target: Tensor) -> Tensor:
    """train.py:466."""
    return F.mse_loss(prediction.float(), target.float(), reduction="mean")
