"""What Open-Sora 2.0's inference.py is about to sample: its network, prompts and sizes, built by the script itself.

The script runs as it is, with its own command line, up to the first call of its denoiser; there it is stopped.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from opensora_perflow.hosts.script import loaded_weights, main_variable
from opensora_perflow.hosts.v2.flux import hooks_of
from opensora_perflow.hosts.v2.network import Told, without_reference
from opensora_perflow.hosts.v2.sampling import SamplingSettings
from opensora_perflow.hosts.v2.text import note_nulls
from opensora_perflow.hosts.v2.tokens import Layout, alphas
from opensora_perflow.hosts.wrappers import unwrap


@dataclass(frozen=True)
class InferenceCall:
    """The first batch, of B videos. Its negative prompts are noted as the texts that guidance leads away from.

    network: Bare. told, layout: Of the batch, see network.network_output. img: Packed noise, [B, L, D].
    guidance: sampling_option.guidance. ratio: The warp of time [B], None: shift=False.
    settings: Of a network with hooks, None: of another. weights: Where the network got its weights.
    """

    network: nn.Module
    told: Told
    layout: Layout
    img: Tensor
    guidance: float
    ratio: Tensor | None
    settings: SamplingSettings | None
    weights: str | None = None


class _Stop(BaseException):
    """Carries the call out of the script; a BaseException, so that no `except Exception` of the host holds it."""

    def __init__(self, call: InferenceCall) -> None:
        self.call = call


class _Recorder:
    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser

    def prepare_guidance(self, *args: Any, **options: Any) -> Any:
        return self.denoiser.prepare_guidance(*args, **options)

    def denoise(self, model: nn.Module, **options: Any) -> Tensor:
        if "masks" not in options or bool(options["masks"].any()):
            raise ValueError(
                'a plan is made for text to video with sampling_option.method="i2v"; leave out references (cond_type) and '
                "use_t2i2v"
            )
        network, found = unwrap(model), hooks_of(model)
        img, _, _ = options["img"].chunk(3)  # rows are [text, negative, negative without reference]
        told = {name: options[name].chunk(3)[0] for name in ("img_ids", "txt", "txt_ids", "y_vec")}
        note_nulls(*(options[name].chunk(3)[1] for name in ("txt", "y_vec")))
        if network.config.cond_embed:
            told["cond"] = without_reference(network, img)
        layout, settings = Layout.of(told["img_ids"], options["patch_size"]), None if found is None else found[0].settings
        flow_shift = options["flow_shift"] if settings is None else settings.keys.flow_shift
        shifted = settings is not None or main_variable("cfg").sampling_option.get("shift", True)
        ratio = alphas(layout, flow_shift, len(img), img.device) if shifted else None
        raise _Stop(InferenceCall(network, told, layout, img, options["guidance"], ratio, settings, loaded_weights()))


def first_call(script: str, arguments: Sequence[str]) -> InferenceCall:
    """Run an inference script until it samples.

    Args:
        script: Of a checkout that run.prepare has made importable.
        arguments: The script's own command line.

    Raises:
        ValueError: the script ended without sampling, wants reference frames, or samples by method "distill".
        SystemExit: the script's own, for wrong arguments.
    """
    from opensora.utils.sampling import SamplingMethodDict

    denoisers = dict(SamplingMethodDict)
    SamplingMethodDict.update({method: _Recorder(denoiser) for method, denoiser in denoisers.items()})
    argv, sys.argv = sys.argv, [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except _Stop as stop:
        return stop.call
    finally:
        sys.argv = argv
        SamplingMethodDict.update(denoisers)
    raise ValueError(f"{script} ended without sampling; name ROOT/scripts/diffusion/inference.py")
