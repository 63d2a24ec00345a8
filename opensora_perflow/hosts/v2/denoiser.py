"""Open-Sora 2.0's denoisers, for students: at the times that they were trained for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opensora_perflow.hosts.v2.flux import PeRFlowFlux, hooks_of
from opensora_perflow.hosts.v2.sampling import other_steps
from opensora_perflow.hosts.v2.tokens import Layout
from opensora_perflow.hosts.wrappers import unwrap


class StudentDenoiser:
    """One of Open-Sora's denoisers. Networks without hooks are sampled as ever, but for the steps of an image model.

    Args:
        denoiser: Open-Sora's.
        t2i_steps: Steps of networks that are no students: what t2i2v draws its first image with.
    """

    def __init__(self, denoiser: Any, t2i_steps: int | None) -> None:
        self.denoiser, self.t2i_steps = denoiser, t2i_steps

    def prepare_guidance(self, *args: Any, **options: Any) -> Any:
        return self.denoiser.prepare_guidance(*args, **options)

    def denoise(self, model: nn.Module, **options: Any) -> Tensor:
        found, times = hooks_of(model), options["timesteps"]
        if found is not None:
            hooks, network = found
            guided = "guidance_img" in options  # "distill" evaluates one row
            referred = guided and bool(options["masks"].any())
            hooks.check_guidance(options["guidance"], guided, options["guidance_img"] if referred else None)
            options["timesteps"] = hooks.times = hooks.sampling_times(times, network, options["img_ids"])
        elif self.t2i_steps is not None and len(times) - 1 != self.t2i_steps:
            warp = Layout.of(options["img_ids"], unwrap(model).patch_size).warp(options.get("flow_shift"))
            options["timesteps"] = other_steps(times, self.t2i_steps, warp)
        return self.denoiser.denoise(model, **options)


def step_students(hooks: PeRFlowFlux) -> None:
    """Put the denoisers of students in the place of Open-Sora's, which reads its table at every video."""
    from opensora.utils.sampling import SamplingMethodDict

    for method, denoiser in SamplingMethodDict.items():
        original = denoiser.denoiser if isinstance(denoiser, StudentDenoiser) else denoiser
        SamplingMethodDict[method] = StudentDenoiser(original, hooks.keys.t2i_steps)
