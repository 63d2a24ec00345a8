"""Open-Sora 2.0 without its scripts: its own MMDiT, tiny or whole, trained and sampled by the scripts' expressions.

Text encoders are the stand-ins of hosts/v2/tiny.py, latents those of the demo's codec (worlds/codec.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.chains import CHAIN, ChainSolver
from opensora_perflow.hosts.v2.chain_solver import chain_solver
from opensora_perflow.hosts.v2.keys import read_config
from opensora_perflow.hosts.v2.models import perflow_flux
from opensora_perflow.hosts.v2.network import call_without_gradient, network_output, without_reference
from opensora_perflow.hosts.v2.tokens import Layout, alphas
from opensora_perflow.planning.probe import Probe
from opensora_perflow.run import prepare

GUIDANCE = 3.0
"""Scale of the teacher."""
PATCH = 2
SIGMA_MIN = 1e-5
DROPOUT = 0.31622777
"""Share of the texts that train.py drops, of T5 and of CLIP independently."""
NETWORK: dict[str, Any] = {
    "guidance_embed": False,
    "fused_qkv": False,
    "use_liger_rope": True,
    "in_channels": 16,
    "vec_in_dim": 16,
    "context_in_dim": 32,
    "hidden_size": 72,
    "mlp_ratio": 4.0,
    "num_heads": 3,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 8, 8],
    "theta": 10_000,
    "qkv_bias": True,
    "cond_embed": True,
}
"""The released model's settings in small."""
STEPS_KEY = "training_steps"
"""Of a teacher, in the metadata of its file."""


class Scripts:
    """What Open-Sora 2.0's scripts have at hand: text encoders, networks by name, training's loss and sampling.

    Args:
        root: A checkout. From then on its modules are imported from there.
        settings: Of the network. text_length: Tokens of a text, the demo's captions have up to 10.
        device, dtype: Of networks and texts.
    """

    def __init__(
        self,
        root: Path,
        settings: Mapping[str, Any] = NETWORK,
        text_length: int = 10,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        prepare(str(root / "scripts" / "diffusion" / "train.py"))
        from opensora_perflow.hosts.v2.tiny import tiny_clip, tiny_t5

        self.root, self.settings, self.there = root, dict(settings), {"device_map": device, "torch_dtype": dtype}
        self.t5 = tiny_t5(max_length=text_length, output_dim=settings["context_in_dim"], **self.there)
        self.clip = tiny_clip(max_length=text_length, output_dim=settings["vec_in_dim"], **self.there)
        self.null_txt, self.null_vec = self.t5(""), self.clip("")

    def network(self, weights: Path | None, perflow: Mapping[str, Any] | None = None) -> nn.Module:
        """Open-Sora's `flux`, or with `perflow` the student `perflow_flux`; weights None: random ones."""
        from opensora.models.mmdit.model import Flux

        named = {"from_pretrained": None if weights is None else str(weights), "strict_load": True}
        settings = {**self.settings, **named, **self.there}
        return Flux(**settings) if perflow is None else perflow_flux(perflow, **settings)

    def loss(
        self, network: nn.Module, data: Tensor, captions: Sequence[str], *, drop: bool, chains: Tensor | None = None
    ) -> Tensor:
        """Of one batch of train.py (prepare_inputs and run_iter) without reference frames.

        Args:
            data: Clean latents [B, C, T, H, W]. captions: B texts.
            drop: Whether to drop texts, as train.py does with dropout_ratio.
            chains: Stored chain of each sample, [B]; None: there are none.
        """
        from opensora.utils.sampling import get_res_lin_function, pack, prepare, time_shift
        from opensora.utils.train import dropout_condition

        shift_alpha = get_res_lin_function()((data.shape[-1] * data.shape[-2]) // 4) * math.sqrt(data.shape[-3])
        t = time_shift(shift_alpha, torch.sigmoid(torch.randn(len(data), device=data.device))).to(data)
        inp = prepare(self.t5, self.clip, data, prompt=list(captions), patch_size=PATCH)
        if drop:
            inp["txt"] = dropout_condition(DROPOUT, inp["txt"], self.null_txt)
            inp["y_vec"] = dropout_condition(DROPOUT, inp["y_vec"], self.null_vec)
        x_0 = pack(data, patch_size=PATCH)
        x_1 = torch.randn_like(x_0)
        t_rev = (1 - t)[:, None, None]
        inp["img"] = t_rev * x_0 + (1 - (1 - SIGMA_MIN) * t_rev) * x_1
        inp["cond"] = x_0.new_zeros(*x_0.shape[:2], x_0.shape[2] + PATCH**2)
        inp["guidance"] = torch.full_like(t, 4.0)
        inp |= {} if chains is None else {CHAIN: chains}
        v_t = (1 - SIGMA_MIN) * x_1 - x_0
        return F.mse_loss(network(**inp, timesteps=t).float(), v_t.float(), reduction="mean")

    def chain_solver(self, network: nn.Module, perflow: Mapping[str, Any], seed: int) -> ChainSolver:
        """What solves chains of text to video by a frozen teacher. See hosts/v2/chain_solver.py."""
        from opensora.utils.sampling import prepare

        def prepared(captions: Sequence[str], latent: Sequence[int]) -> dict[str, Tensor]:
            like = torch.zeros(len(captions), *latent, dtype=self.there["torch_dtype"], device=self.there["device_map"])
            return prepare(self.t5, self.clip, like, prompt=list(captions), patch_size=PATCH)

        return chain_solver(*read_config(perflow), network, prepared, seed)

    @torch.no_grad()
    def sample(self, network: nn.Module, noise: Tensor, prompts: Sequence[str], steps: int, guidance: float) -> Tensor:
        """By Open-Sora's own I2VDenoiser, three rows a step, as inference.py calls it for text to video.

        Args:
            noise: [B, C, T, H, W]. prompts: B texts.
        """
        from opensora.utils.inference import SamplingMethod, prepare_inference_condition
        from opensora.utils.sampling import SamplingMethodDict, get_schedule, prepare

        denoiser = SamplingMethodDict[SamplingMethod.I2V]
        named = {"optional_models": {}, "device": noise.device, "dtype": noise.dtype, "neg": None, "guidance_img": 1.0}
        text, inp = denoiser.prepare_guidance(text=list(prompts), **named)
        inp = {**prepare(self.t5, self.clip, noise, prompt=text, patch_size=PATCH), **inp}
        masks, masked_ref = prepare_inference_condition(noise, "t2v", ref_list=[None] * len(noise), causal=True)
        layout = Layout.of(inp["img_ids"], PATCH)
        times = get_schedule(steps, layout.rows * layout.columns, layout.frames)
        inp |= {"masks": masks, "masked_ref": masked_ref, "sigma_min": SIGMA_MIN, "patch_size": PATCH}
        return layout.unpack(denoiser.denoise(network, **inp, timesteps=times, guidance=guidance))

    def probe(self, network: nn.Module, noise: Tensor, prompts: Sequence[str], scale: float) -> Probe:
        """The network's velocity for prompts, guided by their text; noise [B, C, T, H, W]; time is the sampler's."""
        from opensora.utils.sampling import prepare

        with torch.no_grad():
            told = prepare(self.t5, self.clip, noise, prompt=list(prompts), patch_size=PATCH)
        told["cond"] = without_reference(network, told.pop("img"))
        layout = Layout.of(told["img_ids"], PATCH)
        velocity = network_output(call_without_gradient(network), told, layout, noise.dtype, text_scale=scale)
        return Probe(velocity, noise, alphas(layout, None, len(noise), noise.device))

    def train_teacher(
        self, data: Tensor, captions: Sequence[str], weights: Path, *, steps: int, batch_size: int = 16, lr: float = 2e-3
    ) -> nn.Module:
        """Train a teacher from random weights, seed 0, and write the average of its weights.

        Args:
            data: Clean latents [N, C, T, H, W]. captions: N texts.
            weights: File to write, safetensors.
            steps, batch_size: Optimizer steps, and clips in each.
            lr: Peak learning rate: 100 steps of warm-up, then half a cosine to 0.
        """
        torch.manual_seed(0)
        network = self.network(None).train()
        average = copy.deepcopy(network)
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * i / steps))
        )
        seen = math.nan
        with tqdm(range(steps), desc="training the teacher", unit="step", mininterval=1) as bar:
            for step in bar:
                index = torch.randint(len(data), (batch_size,))
                loss = self.loss(network, data[index], [captions[i] for i in index.tolist()], drop=True)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                rate.step()
                seen = loss.item() if step == 0 else seen + 0.01 * (loss.item() - seen)
                bar.set_postfix(loss=f"{seen:.3f}", refresh=False)
                with torch.no_grad():
                    for mean, new in zip(average.parameters(), network.parameters()):
                        mean.lerp_(new, 1 - min(0.998, step / (step + 10)))
        weights.parent.mkdir(parents=True, exist_ok=True)
        write_state_dict(weights, average.state_dict(), {"format": "pt", STEPS_KEY: str(steps)})
        return average.eval()
