"""What `opensora-perflow plan` and `curve` measure of Open-Sora 2.0: see subjects.host_subject."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import nn

from opensora_perflow.hosts.v2.host import OpenSora2
from opensora_perflow.hosts.v2.inference_call import InferenceCall, first_call
from opensora_perflow.hosts.v2.network import call_without_gradient, network_output
from opensora_perflow.planning.probe import Probe, join
from opensora_perflow.run import prepare
from opensora_perflow.tools.subjects import Guided, Subject, average_of, one_scale
from opensora_perflow.training.teacher import load_teacher

USE = 'model = dict(type="perflow_flux", perflow=dict(windows="{out}"), ...) and sampling_option.num_steps={steps}'


def host_subject(script: str, arguments: Sequence[str], teacher: str | os.PathLike | None) -> Subject:
    """What Open-Sora 2.0's inference script would sample.

    A model of type flux is the teacher. One of type perflow_flux is a student if `teacher` names the weights that it was
    distilled from. Otherwise that model is a teacher too, sampled as the config says, but for oscillating guidance.

    Raises:
        ValueError: a teacher for a flux, or scales that differ from window to window; see run.prepare, first_call and
            teacher.load_teacher.
    """
    prepare(script)
    call = first_call(script, arguments)
    if call.settings is None:
        if teacher is not None:
            raise ValueError(
                'the script\'s config has model type "flux", which is a teacher itself, and --teacher names another; write '
                'type="perflow_flux" for a student, or leave out --teacher'
            )
        guidance = Guided(call.guidance)
        return Subject("flux", _probes(call, call.network, guidance), branches=(guidance.branches, guidance.branches), use=USE)
    recipe, windows = call.settings.recipe, call.settings.windows
    own = {"sync": Guided(call.guidance), "fixed": Guided(), "range": Guided(told=call.guidance)}[recipe.guidance.mode]
    student = _probes(call, call.network, own)
    if teacher is None:
        return Subject("perflow_flux", student, windows=windows, branches=(own.branches, own.branches), use=USE)
    fixed = recipe.guidance.mode == "fixed"
    guidance = Guided(one_scale("guidance.scale", recipe.guidance.scale) if fixed else call.guidance)
    frozen = load_teacher(call.network, teacher, OpenSora2().weights)
    averaged = average_of(call.network, call.weights, OpenSora2().weights)
    average = averaged and _probes(call, averaged, own)
    branches = guidance.branches, own.branches
    return Subject("perflow_flux", _probes(call, frozen, guidance), student, windows, branches, average, USE)


def _probes(call: InferenceCall, network: nn.Module, guidance: Guided) -> Callable[[int, int], Probe]:
    """Probes of whole batches of the call's prompts, as many as are needed, each batch with noise of its own."""
    told = dict(call.told)
    if network.config.guidance_embed:
        scale = call.guidance if guidance.told is None else guidance.told
        told["guidance"] = call.img.new_full((len(call.img),), scale)
    velocity = network_output(call_without_gradient(network), told, call.layout, call.img.dtype, text_scale=guidance.scale)

    def probe(count: int, seed: int) -> Probe:
        generator, like = torch.Generator().manual_seed(seed), call.layout.unpack(call.img)
        batches = -(-count // len(like))
        noise = [torch.randn(like.shape, generator=generator).to(like.device) for _ in range(batches)]
        return join([Probe(velocity, own, call.ratio) for own in noise])

    return probe
