"""What `opensora-perflow plan` and `curve` measure of Open-Sora 2.0: see subjects.host_subject."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.v2.host import OpenSora2
from opensora_perflow.hosts.v2.inference_call import InferenceCall, first_call
from opensora_perflow.hosts.v2.network import call_without_gradient, network_output
from opensora_perflow.method.solvers import Velocity
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.planning.probe import Probe, join
from opensora_perflow.run import prepare
from opensora_perflow.tools.subjects import Guided, Subject, average_of, refuse_told_steps
from opensora_perflow.training.teacher import load_teacher

USE = 'model = dict(type="perflow_flux", perflow=dict(windows="{out}"), ...) and sampling_option.num_steps={steps}'
WHOLE = TimeWindows.uniform(1)


def host_subject(script: str, arguments: Sequence[str], teacher: str | os.PathLike | None) -> Subject:
    """What Open-Sora 2.0's inference script would sample.

    A model of type flux is the teacher. One of type perflow_flux is a student if `teacher` names the weights that it was
    distilled from. Otherwise that model is a teacher too, sampled as the config says, but for oscillating guidance. The teacher
    is guided in each window by the scale that the student has folded in there.

    Raises:
        ValueError: a teacher for a flux, or a student of draws.two_time; see run.prepare, first_call and teacher.load_teacher.
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
    refuse_told_steps(call.settings.two_time)
    recipe, windows = call.settings.recipe, call.settings.windows
    own = {"sync": Guided(call.guidance), "fixed": Guided(), "range": Guided(told=call.guidance)}[recipe.guidance.mode]
    student = _probes(call, call.network, own)
    if teacher is None:
        return Subject("perflow_flux", student, windows=windows, branches=(own.branches, own.branches), use=USE)
    scale = recipe.guidance.scale if recipe.guidance.mode == "fixed" else call.guidance
    scales = scale if isinstance(scale, tuple) else (scale,) * windows.num_windows
    frozen = load_teacher(call.network, teacher, OpenSora2().weights)
    averaged = average_of(call.network, call.weights, OpenSora2().weights)
    average = averaged and _probes(call, averaged, own)
    branches = max(Guided(each).branches for each in scales), own.branches
    taught = _probes(call, frozen, *map(Guided, scales), windows=windows)
    return Subject("perflow_flux", taught, student, windows, branches, average, USE)


def _probes(
    call: InferenceCall, network: nn.Module, *guidance: Guided, windows: TimeWindows = WHOLE
) -> Callable[[int, int], Probe]:
    """Probes of whole batches of the call's prompts, as many as are needed, each batch with noise of its own.

    guidance: One for each of the windows.
    """
    bounds = WarpedWindows(windows, len(call.img), call.ratio, call.img.device)
    fields = {one: _field(call, network, one) for one in dict.fromkeys(guidance)}

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        index = int(bounds.lookup(t)[0])  # all samples have one size, and one warp
        return fields[guidance[index]](x, t)

    def probe(count: int, seed: int) -> Probe:
        generator, like = torch.Generator().manual_seed(seed), call.layout.unpack(call.img)
        batches = -(-count // len(like))
        noise = [torch.randn(like.shape, generator=generator).to(like.device) for _ in range(batches)]
        return join([Probe(velocity, own, call.ratio) for own in noise])

    return probe


def _field(call: InferenceCall, network: nn.Module, guidance: Guided) -> Velocity:
    told = dict(call.told)
    if network.config.guidance_embed:
        scale = call.guidance if guidance.told is None else guidance.told
        told["guidance"] = call.img.new_full((len(call.img),), scale)
    return network_output(call_without_gradient(network), told, call.layout, call.img.dtype, text_scale=guidance.scale)
