"""What `opensora-perflow plan` and `curve` measure: a teacher, perhaps its student, and noise for both."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opensora_perflow.checkpoints import read_state_dict
from opensora_perflow.hosts.v1.conditions import sampling_condition, with_negative
from opensora_perflow.hosts.v1.inference_call import InferenceCall, first_call
from opensora_perflow.hosts.v1.keys import Keys
from opensora_perflow.hosts.v1.stdit import velocity_field
from opensora_perflow.hosts.v1.weights import read_weights
from opensora_perflow.hosts.wrappers import unwrap
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.planning.probe import Probe, join
from opensora_perflow.registry import SCHEDULERS, build_module
from opensora_perflow.run import prepare
from opensora_perflow.tools.probes import mixture_probe, video_probe
from opensora_perflow.training.adapters import adapters
from opensora_perflow.training.state import averages_beside, find_state
from opensora_perflow.training.teacher import load_teacher
from opensora_perflow.worlds.mixture import Mixture, MixtureNetwork
from opensora_perflow.worlds.model import load_teacher as load_video_teacher

GUIDANCE = {"video": 3.0, "mixture": 2.0}
"""Scales of the demo's and of the benchmark's teacher."""


@dataclass(frozen=True)
class Subject:
    """A guided teacher, and a student of it if there is one; each makes a probe of (number of samples, seed).

    windows: the student's, also where it is its own teacher; None where they are not known.
    branches: network evaluations of a (teacher's, student's) step.
    average: probes of the average of a student's weights, where it lies beside those of one step that were named.
    use: how a config names the plan {out} for {steps} steps.
    """

    name: str
    teacher: Callable[[int, int], Probe]
    student: Callable[[int, int], Probe] | None = None
    windows: TimeWindows | None = None
    branches: tuple[int, int] = (2, 1)
    average: Callable[[int, int], Probe] | None = None
    use: str = 'scheduler = dict(type="perflow", windows="{out}", num_sampling_steps={steps}, ...)'


def demo_subject(model: str, student: str | os.PathLike | None, windows: TimeWindows, guidance_scale: float | None) -> Subject:
    """The demo's tiny video model or the mixture; a student of it has its guidance folded in.

    Raises:
        ValueError: weights that are not there or do not fit.
    """
    scale = GUIDANCE[model] if guidance_scale is None else guidance_scale
    probe = {"video": video_probe, "mixture": mixture_probe}[model]
    branches = (1 if scale == 1.0 else 2, 1)
    if student is None:
        return Subject(model, lambda count, seed: probe(count, seed, scale), branches=branches)
    network, file = load_teacher(_demo_network(model, student), student), averages_beside(student)
    average = None if file is None else load_teacher(network, file)
    return Subject(
        model,
        lambda count, seed: probe(count, seed, scale),
        lambda count, seed: probe(count, seed, 1.0, network),
        windows,
        branches,
        None if average is None else lambda count, seed: probe(count, seed, 1.0, average),
    )


def _demo_network(model: str, weights: str | os.PathLike) -> nn.Module:
    if model == "video":
        return load_video_teacher()
    state = read_state_dict(weights)
    width = state["layers.0.weight"].shape[0] if "layers.0.weight" in state else 128
    return MixtureNetwork(Mixture.standard(), width)


def host_subject(script: str, arguments: Sequence[str], teacher: str | os.PathLike | None) -> Subject:
    """What an Open-Sora inference script would sample.

    With scheduler type rflow its network is the teacher. With type perflow it is a student if `teacher` names the weights that
    it was distilled from. Else it is a teacher too, sampled as the config says.

    Raises:
        ValueError: a scheduler other than rflow and perflow, a perflow of the ddpm path, a teacher for an rflow, scales that
            differ from window to window, or a student of draws.two_time. See run.prepare, first_call and teacher.load_teacher.
    """
    prepare(script)
    call = first_call(script, arguments)
    config = dict(call.scheduler)
    kind = config.pop("type", None)
    if kind not in ("rflow", "perflow"):
        raise ValueError(f"plans are made for rectified flows: scheduler type rflow or perflow, got {kind!r}")
    if kind == "rflow" and teacher is not None:
        raise ValueError(
            "the script's config has scheduler type rflow, which is a teacher itself, and --teacher names another; give the "
            "config that the student is sampled with, such as configs/opensora/perflow_inference_stage2.py, or leave "
            "out --teacher"
        )
    if kind == "rflow":
        config = {**config, "windows": 1, "path": "linear"}
    scheduler = build_module(dict(type="perflow", **config), SCHEDULERS)
    trained = call.weights is not None and find_state(call.weights) is not None
    scheduler.take_from(call.weights, unwrap(call.model))
    recipe, keys = scheduler.settings.recipe, scheduler.settings.keys
    ratio = keys.window_ratio(call.additional_args)
    if keys.path == "ddpm":
        raise ValueError('plans are made for rectified flows, path="linear", got path="ddpm"')
    refuse_told_steps(scheduler.settings.two_time)
    scale = one_scale("cfg_scale", scheduler.step_scales())
    own_guidance = {"sync": Guided(scale), "fixed": Guided(), "range": Guided(told=scale)}[recipe.guidance.mode]
    own_negative = None if recipe.guidance.folded else call.neg_prompts  # the student's are in its weights
    own = _host_probes(call, call.model, own_guidance, own_negative, keys, ratio)
    if teacher is None:
        windows = scheduler.windows if trained or "windows" in scheduler.given else None
        return Subject(kind, own, windows=windows, branches=(own_guidance.branches, own_guidance.branches))
    if recipe.guidance.mode == "fixed":
        scale = one_scale("guidance.scale", recipe.guidance.scale)
    guidance = Guided(scale)
    frozen = load_teacher(unwrap(call.model), teacher, read_weights)
    negative = scheduler.negative_text() if recipe.guidance.folded else call.neg_prompts
    by_teacher = _host_probes(call, frozen, guidance, negative, keys, ratio)
    averaged = average_of(unwrap(call.model), call.weights, read_weights)
    average = averaged and _host_probes(call, averaged, own_guidance, own_negative, keys, ratio)
    return Subject(kind, by_teacher, own, scheduler.windows, (guidance.branches, own_guidance.branches), average)


def average_of(
    network: nn.Module, weights: str | os.PathLike | None, read: Callable[[str | os.PathLike, nn.Module], Mapping[str, Tensor]]
) -> nn.Module | None:
    """A copy of a whole network with the average that lies beside its weights; None where none does, or of adapters."""
    file = None if weights is None else averages_beside(weights)
    return None if file is None or adapters(network) else load_teacher(network, file, read)


@dataclass(frozen=True)
class Guided:
    """Guidance of a network: by a scale from outside (1 = none), or by one that it is told."""

    scale: float = 1.0
    told: float | None = None

    @property
    def branches(self) -> int:
        return 1 if self.scale == 1.0 else 2


def one_scale(name: str, scales: float | Sequence[float]) -> float:
    """The scale that is the same in every window."""
    distinct = list(dict.fromkeys(scales if isinstance(scales, Sequence) else [scales]))
    if len(distinct) > 1:
        raise ValueError(f"plan and curve measure at one guidance scale in all windows, got {name} {distinct}; set one number")
    return distinct[0]


def refuse_told_steps(two_time: bool) -> None:
    """Raises ValueError for a student whose answer is that of one step's length, which plan and curve do not tell."""
    if two_time:
        raise ValueError(
            "this student was trained with draws.two_time and is told the length of its step, and plan and curve ask at a time "
            "alone; sample it, with steps that it was trained for"
        )


def _host_probes(
    call: InferenceCall,
    network: nn.Module,
    guidance: Guided,
    negative: Sequence[str] | Mapping[str, Tensor] | None,
    keys: Keys,
    ratio: Tensor | None,
) -> Callable[[int, int], Probe]:
    """Probes of whole batches of the call's prompts, as many as are needed, each batch with noise of its own.

    negative: prompts in place of the null text, or one that was embedded before training (see hosts/v1/negative_text.py).
    """
    embedded = isinstance(negative, Mapping)
    told = None if guidance.told is None else torch.full((len(call.prompts),), guidance.told, dtype=torch.float64)
    condition = sampling_condition(
        unwrap(network),
        call.text_encoder,
        call.prompts,
        negative_prompts=None if embedded else negative,
        additional_args=call.additional_args,
        reference=None,
        needs_null=guidance.branches > 1,
    )
    if embedded and guidance.branches > 1:
        condition = with_negative(condition, negative)
    velocity = velocity_field(
        network,
        unwrap(network),
        condition,
        num_timesteps=int(keys.num_timesteps),
        text_scale=guidance.scale,
        flaw_fix=keys.use_flaw_fix and guidance.branches > 1,
        told=told,
    )

    def probe(count: int, seed: int) -> Probe:
        generator = torch.Generator().manual_seed(seed)
        batches = -(-count // len(call.prompts))
        noise = [torch.randn(call.z.shape, generator=generator).to(call.device) for _ in range(batches)]
        return join([Probe(velocity, own, ratio) for own in noise])

    return probe
