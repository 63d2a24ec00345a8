"""PeRFlow in Open-Sora 2.0: two hooks on the network that its scripts build, train and sample.

train.py noises latents itself, calls the network and compares the answer with its own target. Before the network's forward,
state and time become those that the objective asks for; after it, the answer brings its own loss (see prediction.py). The
network stays Open-Sora's own class, so that boosters, policies, EMA, LoRA and checkpoints see nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.chains import check_batch, open_store
from opensora_perflow.hosts.scale_input import tell
from opensora_perflow.hosts.script import main_variable
from opensora_perflow.hosts.v2.host import OpenSora2
from opensora_perflow.hosts.v2.keys import read_config
from opensora_perflow.hosts.v2.prediction import Prediction
from opensora_perflow.hosts.v2.sampling import SamplingSettings, one_row, step_at
from opensora_perflow.hosts.v2.stored_chains import WHERE, path_settings
from opensora_perflow.hosts.v2.tokens import Layout
from opensora_perflow.hosts.v2.training_call import TrainingCall, completed
from opensora_perflow.hosts.wrappers import unwrap
from opensora_perflow.objectives import combine
from opensora_perflow.training.run import TrainingRun, known_of
from opensora_perflow.training.state import StudentState, find_state, raw_weights, sampling_mismatch
from opensora_perflow.training.step import distil

logger = logging.getLogger("opensora_perflow")


class PeRFlowFlux:
    """The hooks of one network.

    Args:
        config: The keys of keys.Keys and recipe.Recipe.

    Attributes:
        recipe, keys: The config, validated. objective: What is minimised.
        run: What training remembers; None before the first training step.
        host: Who answers `training.host.Host`.
        evaluations: Rows of the network that sampling evaluated.
        times: Of the sampler's steps, from 1 to 0, set before the first.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.recipe, self.keys = read_config(config)
        self.given = frozenset(config or {})
        self.objective, self.curriculum = combine(self.recipe.objective), self.recipe.stages()
        self.host = OpenSora2()
        self.run: TrainingRun | None = None
        self.evaluations, self.times = 0, (1.0, 0.0)
        self._sampled: SamplingSettings | None = None
        self._step: Any = None
        self._copies, self._tells = 1, False
        self._said: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> PeRFlowFlux:
        """Itself: an EMA copy of the network takes neither teacher nor run along."""
        return self

    def attach(self, network: nn.Module) -> nn.Module:
        """The network, with these hooks."""
        network.register_forward_pre_hook(self.before, with_kwargs=True)
        network.register_forward_hook(self.after, with_kwargs=True)
        return network

    def before(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What the network is called with instead.

        Raises:
            ValueError: see TrainingCall.of, TrainingRun.begin and text.null_text.
        """
        if args:
            raise ValueError(f"the network of Open-Sora 2.0 is called by keywords, got {len(args)} arguments without names")
        arguments = completed(network, kwargs)
        self._step, self._copies, self._tells = None, 1, False
        if network.training and torch.is_grad_enabled():
            return args, self._begin_step(network, arguments)
        if not network.training:
            if self.settings.recipe.guidance.folded:
                arguments, self._copies = one_row(arguments)
            self.evaluations += len(arguments["img"])
            if self.settings.two_time:
                self._tell(network, step_at(self.times, arguments["timesteps"]))
        return args, arguments

    def after(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """What the script gets as the network's answer."""
        if self._tells:
            tell(network, None)
        if self._step is not None:
            return self._end_step(network, output)
        return output if self._copies == 1 else output.repeat(self._copies, 1, 1)

    def _begin_step(self, network: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
        call = TrainingCall.of(network, arguments)
        if self.run is None:
            store = open_store(self.recipe, path_settings(self.keys, network.patch_size))
            told = self._describe, vars(self.keys), store
            self.run = TrainingRun.begin(self.recipe, self.host, network, self.curriculum, *told)
            self.host.follow(network)
        check_batch(call.chains, call.latent, self.run.store, WHERE)
        generator = self.run.randomness.next_generator(call.img.device)
        batch = call.batch(self.run, self.keys, generator)
        segment = self.run.solve(batch, network)
        student = batch.players.student.velocity(segment.bounds)
        distil(batch, self.objective, segment, student)  # the rehearsal, see evaluation.py
        self._step, evaluation = (call, batch, segment), batch.players.evaluation
        if self.recipe.draws.two_time:
            self._tell(network, evaluation.steps)
        return evaluation.inputs(call.img.dtype)

    def _tell(self, network: nn.Module, lengths: Tensor) -> None:
        """Have the call that comes told the lengths of its rows' steps; `after` takes them back."""
        self._tells = True
        tell(network, lengths)

    def _end_step(self, network: nn.Module, output: Tensor) -> Tensor:
        (call, batch, segment), self._step = self._step, None
        evaluation = batch.players.evaluation
        evaluation.answer(output)
        loss = self.run.learn(batch, segment, self.objective, network)
        evaluation.close()
        return Prediction.of(output, loss.mean(), lambda target: self.run.look(call.compared(batch, target), network))

    @property
    def settings(self) -> SamplingSettings:
        """What the sampler goes by: the config, and what the state beside the weights says where the config is silent."""
        if self._sampled is None:
            config = main_variable("cfg") or {}
            settings = SamplingSettings.of(self.recipe, self.keys)
            weights = config.get("pretrained_lora_path") or (config.get("model") or {}).get("from_pretrained")
            found = None if weights is None or self.run is not None else find_state(weights)
            if found is not None:
                settings = settings.as_trained(self.given, *found)
                self._say(self._report(settings, *found))
            self._sampled = settings
        return self._sampled

    def sampling_times(self, asked: Sequence[float], network: nn.Module, img_ids: Tensor) -> list[float]:
        """The times of as many steps as `asked` has, at which the student is sampled."""
        settings = self.settings
        warp = Layout.of(img_ids, network.patch_size).warp(settings.keys.flow_shift)
        times, said = settings.times(asked, warp)
        self._say(said)
        return times

    def check_guidance(self, scale: float, guided: bool, image_scale: float | None) -> None:
        """Say where the student is guided otherwise than its starts in training were.

        Args:
            scale, image_scale: sampling_option.guidance and guidance_img; image_scale None: no reference frames.
            guided: Does the denoiser guide, or only tell the network its scale?

        Raises:
            ValueError: mode range was not trained for the scale.
        """
        settings = self.settings
        settings.recipe.guidance.check_told([scale], "sampling_option.guidance")
        self._say(settings.other_guidance(scale if guided else 1.0, image_scale))

    def _report(self, settings: SamplingSettings, found: StudentState, where: Any) -> list[tuple[int, str]]:
        recipe = settings.recipe
        text = (
            f"PeRFlow samples with {settings.windows.num_windows} windows and guidance mode {recipe.guidance.mode}; what the "
            f"config leaves out is from {where}"
        )
        warnings = sampling_mismatch(found, self._state(settings), where), raw_weights(Path(where).parent)
        return [(logging.INFO, text), *((logging.WARNING, warning) for warning in warnings if warning)]

    def _state(self, settings: SamplingSettings, run: TrainingRun | None = None) -> StudentState:
        recipe, keys = settings.recipe, settings.keys
        guided = not recipe.guidance.folded and recipe.draws.starts == "student"
        return StudentState(
            cfg_scale=keys.cfg_scale if guided else None,
            image_cfg_scale=keys.image_cfg_scale if guided else None,
            windows=settings.windows.edges,
            transform={"formula": "v2.0", "flow_shift": keys.flow_shift},
            path="linear",
            prediction="velocity",
            **known_of(recipe, self.curriculum, run),
        )

    def state(self) -> StudentState:
        """What has to be kept with a student's weights. To be asked after the first training step."""
        return self._describe(self.run)

    def _describe(self, run: TrainingRun) -> StudentState:
        return self._state(SamplingSettings(self.recipe, self.keys, run.windows, self.recipe.draws.grids), run)

    def _say(self, messages: Iterable[tuple[int, str]]) -> None:
        for level, message in messages:
            if message not in self._said:
                self._said.add(message)
                logger.log(level, message)


def hooks_of(model: nn.Module) -> tuple[PeRFlowFlux, nn.Module] | None:
    """The hooks of a network inside any wrappers, and the network; None where it has none."""
    network = unwrap(model)
    for hook in network._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, PeRFlowFlux):
            return owner, network
    return None
