"""A call of the network by Open-Sora 2.0's train.py, turned into a batch of the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.conventions import expand_like
from opensora_perflow.hosts.v2.keys import Keys
from opensora_perflow.hosts.v2.network import without_reference
from opensora_perflow.hosts.v2.players import TrainingPlayers
from opensora_perflow.hosts.v2.stored_chains import named_chains
from opensora_perflow.hosts.v2.tokens import Layout, alphas
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.training.blame import TEXT
from opensora_perflow.training.players import Batch
from opensora_perflow.training.run import TrainingRun

ARGUMENTS = ("img_ids", "txt", "txt_ids", "y_vec", "cond", "guidance")
"""What the network is told of each sample; img and timesteps are its state and time, all else it ignores."""


@dataclass(frozen=True)
class TrainingCall:
    """The arguments of one call.

    img: x_t, [B, L, D]. timesteps: t, [B], as the network is told. told: See ARGUMENTS. layout: Of the tokens.
    chains: Stored chain of each sample, [B], see stored_chains.py; None: there are none.
    """

    network: nn.Module
    img: Tensor
    timesteps: Tensor
    told: Mapping[str, Tensor]
    layout: Layout
    chains: Tensor | None = None

    @classmethod
    def of(cls, network: nn.Module, arguments: Mapping[str, Any]) -> TrainingCall:
        """Raises ValueError where an argument is missing that train.py passes, or `cond` does not go with the network."""
        missing = [name for name in ("img", "timesteps", *ARGUMENTS[:4]) if arguments.get(name) is None]
        if missing:
            raise ValueError(
                f"the network was called without {', '.join(missing)}; Open-Sora 2.0's train.py passes img, timesteps and "
                f"{', '.join(ARGUMENTS[:4])} by name"
            )
        told = {name: arguments[name].detach() for name in ARGUMENTS if arguments.get(name) is not None}
        if not network.config.cond_embed:
            told.pop("cond", None)
        if not network.config.guidance_embed:
            told.pop("guidance", None)
        layout = Layout.of(arguments["img_ids"], network.patch_size)
        chains = named_chains(arguments)
        return cls(network, arguments["img"].detach(), arguments["timesteps"].detach(), told, layout, chains)

    @property
    def latent(self) -> tuple[int, ...]:
        """C, T, H, W."""
        layout = self.layout
        channels = self.img.shape[-1] // layout.patch**2
        return channels, layout.frames, layout.rows * layout.patch, layout.columns * layout.patch

    @property
    def level(self) -> Tensor:
        """The share of noise in x_t [B], float64: train.py rounds 1 - t to the network's precision."""
        return 1.0 - (1 - self.timesteps).double()

    def warped(self, windows: TimeWindows, keys: Keys) -> WarpedWindows:
        batch_size, device = len(self.img), self.img.device
        return WarpedWindows(windows, batch_size, alphas(self.layout, keys.flow_shift, batch_size, device), device)

    def batch(self, run: TrainingRun, keys: Keys, generator: torch.Generator) -> Batch:
        """The order of draws is windows, noise, scale. Diffused starts train each window as often as train.py noises data to
        a time in it, of four windows 14, 36, 36 and 14 %."""
        recipe, windows = run.recipe, self.warped(run.windows, keys)
        grids = [TimeWindows.uniform(steps) for steps in recipe.draws.grids]
        diffused = recipe.draws.starts == "diffused"
        # A start has at least the noise of x_t: its window is the one that x_t lies in.
        level = self.level.clamp(0, 1) if diffused else None
        drawn = run.draw(windows, generator, grids=grids, given=level, as_given=diffused)
        x = self.layout.unpack(self.img).float()
        if self.chains is None:
            noise = torch.randn(x.shape, device=x.device, generator=generator)
        else:
            noise = torch.zeros_like(x)  # a store gives it where a window starts there
        data = x
        if diffused:
            data, noise = renoised(x, self.level, noise, drawn.t_start)
        scale = recipe.guidance.draw_scale(drawn.window_idx, generator)
        if self.chains is not None and recipe.guidance.mode == "range":
            scale = run.store.scales(self.chains).to(x.device)
        told = dict(self.told)
        if recipe.guidance.mode == "range":
            told["guidance"] = scale.to(self.img)
        route = drawn.route if recipe.draws.two_time else None
        players = TrainingPlayers(self.network, told, self.layout, self.img.dtype, recipe, keys, lambda: run.teacher, route)
        named = partial(self._named, recipe.guidance.image_scale)
        return Batch(data, noise, windows, drawn, players, scale, chains=self.chains, inputs=named)

    def compared(self, batch: Batch, target: Tensor) -> Batch:
        """The batch with the data and the noise that train.py made x_t from; target is their difference, noise - data.

        sigma_min, by which the target's noise is less, is below what 16 bits tell.
        """
        x, velocity = (self.layout.unpack(value).float() for value in (self.img, target))
        noise = x + expand_like(1.0 - self.level, x) * velocity
        return replace(batch, data=noise - velocity, noise=noise)

    def _named(self, image_scale: float | None) -> dict[str, Any]:
        """What the networks are told besides state and time, by name in words, in the order in which it is suspected."""
        words = {"txt": TEXT, "y_vec": "CLIP's embeddings of the text", "cond": "the latents of reference frames"}
        named: dict[str, Any] = {word: self.told[name] for name, word in words.items() if name in self.told}
        if image_scale is not None:
            named["guidance.image_scale"] = float(image_scale)
        return named


def renoised(x_t: Tensor, t: Tensor, noise: Tensor, t_start: Tensor) -> tuple[Tensor, Tensor]:
    """Data and noise whose point at t_start has the law of x_t with more noise.

    x_s = a x_t + sqrt(t_s^2 - a^2 t^2) noise with a = (1 - t_s) / (1 - t): given the clean data, mean and variance are those of
    (1 - t_s) data + t_s noise.

    Args:
        x_t: Points of the straight path at times t [B], t <= t_start [B]. noise: Like x_t.
    """
    rest = (1.0 - t).clamp(min=1e-6)  # t = 1 has t_start = 1, where nothing of x_t is left
    kept = (1.0 - t_start) / rest * t
    more = (t_start.square() - kept.square()).clamp(min=0).sqrt() / t_start
    return x_t / expand_like(rest, x_t), expand_like(more, noise) * noise


def completed(network: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with "no reference frames" for a network that wants some and gets none (text to video)."""
    arguments = dict(arguments)
    if network.config.cond_embed and arguments.get("cond") is None:
        arguments["cond"] = without_reference(network, arguments["img"])
    return arguments
