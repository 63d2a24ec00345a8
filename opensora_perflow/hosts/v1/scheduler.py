"""`perflow`: the object that Open-Sora 1.x builds. It turns the host's calls into the method's words, and losses back."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.script import loaded_weights
from opensora_perflow.hosts.v1.host import OpenSora
from opensora_perflow.hosts.v1.iddpm import find_process
from opensora_perflow.hosts.v1.keys import Keys, read_config
from opensora_perflow.hosts.v1.lora import check_recipe, record_of
from opensora_perflow.hosts.v1.negative_text import read_negative
from opensora_perflow.hosts.v1.network import Interface
from opensora_perflow.hosts.v1.sampling import SamplingCall, StepGuidance, reference_of, sample_latents, without_effect
from opensora_perflow.hosts.v1.sampling_settings import SamplingSettings, as_trained
from opensora_perflow.hosts.v1.stored_chains import check_call, open_store, take_chains
from opensora_perflow.hosts.v1.training_call import TrainingCall, Translation
from opensora_perflow.hosts.wrappers import unwrap
from opensora_perflow.method.ddpm import DDPM
from opensora_perflow.method.process import Linear, Process, check_prediction
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.objectives import Objective, combine
from opensora_perflow.registry import SCHEDULERS
from opensora_perflow.training.curriculum import Curriculum
from opensora_perflow.training.host import Host
from opensora_perflow.training.recipe import Recipe
from opensora_perflow.training.run import TrainingRun, known_of
from opensora_perflow.training.state import StudentState, find_state

logger = logging.getLogger("opensora_perflow")


@SCHEDULERS.register_module("perflow")
class PeRFlow:
    """PeRFlow for Open-Sora: `training_losses` distils a frozen teacher window by window, `sample` takes a few Euler steps.

    Built by the host from `scheduler=dict(type="perflow", ...)`; the keys are those of `recipe.Recipe` and `keys.Keys`.
    Construction is cheap and touches no weights. The run begins at the first training step, where its teacher is made, and
    survives a repeated `__init__` (Open-Sora's gradio app re-initialises the live object).

    Attributes:
        recipe, keys: The config, validated. given: The keys that it names.
        num_timesteps: Of the network; the host reads the number.
        objective: What is minimised, see objectives/.
        curriculum: The stages of a run with fewer and fewer windows, and where the run is among them; None without.
        run: What training remembers; None before the first training step.
        host: Who answers `training.host.Host`.

    Raises:
        ValueError: unknown keys or invalid values (received, accepted, remedy).
    """

    recipe: Recipe
    keys: Keys
    given: frozenset[str]
    objective: Objective
    host: Host = OpenSora()
    run: TrainingRun | None = None
    curriculum: Curriculum | None = None

    def __init__(self, /, **config: Any) -> None:
        previous: Recipe | None = getattr(self, "recipe", None)
        recipe, keys = read_config(config)
        objective, known = combine(recipe.objective), find_process(keys.path)
        process = None if known is None else build_process(known, recipe, keys)
        curriculum = self.curriculum if recipe.same_stages(previous) else recipe.stages()
        if self.run is not None:
            self.run.change(recipe, curriculum)
        # Nothing refuses from here on: a live object is changed as a whole, or not at all.
        self.recipe, self.keys, self.objective, self.curriculum = recipe, keys, objective, curriculum
        self.given = frozenset(config)
        self._process: Process | None = process
        self._prediction: str | None = None
        self._trained: SamplingSettings | None = None
        self.num_timesteps = int(keys.diffusion_steps if known == "ddpm" else keys.num_timesteps)
        self._negative: dict[str, Tensor] | None = None
        self._said: set[str] = set()

    def training_losses(
        self,
        model: nn.Module,
        x_start: Tensor,
        model_args: Mapping[str, Any] | Tensor | None = None,
        noise: Tensor | Mapping[str, Any] | None = None,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        t: Tensor | None = None,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        mask_index: Sequence[int] | None = None,
        x_gt: Tensor | None = None,
        noise_disable_threshold: float | None = None,
        text_uncond_prob: float | None = None,
        x_noisy_ref: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One training step's losses, with the arguments of Open-Sora 1.2's and 1.3's rflow, or of 1.0's and 1.1's iddpm.

        1.0 and 1.1 pass t [B] as the third argument and model_args as the fourth, the others model_args as the third.

        Args:
            model: The student, in the booster's wrapper or bare.
            x_start: Clean latents, [B, C, T, H, W]; never written to. Student starts take their shape, and the frames that
                `mask` keeps.
            model_args: y [B, 1, L, D], mask [B, L], and sizes [B]; also as `model_kwargs`.
            noise: Noise of the window starts (or that the student starts from), like x_start; drawn in float32 if None.
            mask: bool [B, T], True = generated frame; False frames stay clean and do not count.
            weights: Loss weight of each timestep, [num_timesteps] or None.
            t: Timesteps, [B]; drawn if None. With path="linear" in [0, num_timesteps] and taken as already transformed, as
                upstream does; with path="ddpm" indices 0..num_timesteps - 1. By name t is the only time that is trained. As
                1.0's and 1.1's third argument t is their train.py's draw, and `draws` adds to t as to one of ours.
            mask_index: Latent indices of reference frames (v1.3); None and [] both train text-to-video in the way it is
                sampled, without the reference embedders' biases.
            x_gt: Clean latents where x_start was degraded (v1.3). The target comes from the teacher, so they are used only
                above `noise_disable_threshold`.
            noise_disable_threshold: Timestep above which windows start from x_gt.
            text_uncond_prob: Probability of dropping a prompt; None: the network's own. Not used with fixed guidance.
            x_noisy_ref: Latents to take the reference frames from; x_start if None.

        Returns:
            dict(loss=[B] float32 with the student's graph). The loss is in units of the network's output, see
            ddpm.output_gain; with path="ddpm" the variance half's loss is added.

        Raises:
            ValueError: see teacher.first_teacher and conditions.py; a teacher that is not finite.
        """
        drawn_by_host = isinstance(model_args, Tensor)  # as train.py of 1.0 and 1.1 does
        if drawn_by_host:
            t, model_args, noise = model_args, noise, None
        x_start, t, noise, mask, mask_index, x_gt, text_uncond_prob, x_noisy_ref = self.host.shared(
            x_start, t, noise, mask, mask_index, x_gt, text_uncond_prob, x_noisy_ref
        )
        student = Interface.of(model)
        if self.run is None:  # a run has its own settings, whatever was sampled before
            self._forget_trained()
        process, prediction = self.process_of(student.network)
        if self.run is None:
            self.keys.say_what_has_no_effect()
            check_recipe(self.recipe, student.network, drawn_by_host)
            store = open_store(self.recipe, self.keys, process)
            self.run = TrainingRun.begin(self.recipe, self.host, model, self.curriculum, self._describe, vars(self.keys), store)
        translation = Translation(self.run, self.keys, process, prediction, self.negative_text())
        told = model_args or model_kwargs or {}
        windows = self.warped(told, x_start)
        told, chains = take_chains(told)
        call = TrainingCall(
            model, student, x_start, told, t, drawn_by_host, noise, mask, weights,
            mask_index, x_gt, noise_disable_threshold, text_uncond_prob, x_noisy_ref, chains,
        )  # fmt: skip
        check_call(call, self.run.store)
        generator = self.run.randomness.next_generator(x_start.device)
        batch, host_losses = translation.batch(call, windows, generator)
        return {"loss": host_losses.added_to(self.run.step(batch, self.objective, model))}

    def sample(
        self,
        model: nn.Module,
        text_encoder: Any,
        z: Tensor | None = None,
        prompts: Sequence[str] = (),
        device: torch.device | str = "cpu",
        additional_args: Mapping[str, Any] | None = None,
        mask: Tensor | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        image_cfg_scale: float | None = None,
        progress: bool = True,
        neg_prompts: Sequence[str] | None = None,
        z_cond: Tensor | None = None,
        z_cond_mask: Tensor | None = None,
        mask_index: Sequence[int] | None = None,
        use_sdedit: bool = False,
        use_oscillation_guidance_for_text: bool | None = None,
        use_oscillation_guidance_for_image: bool | None = None,
        z_size: Sequence[int] | None = None,
    ) -> Tensor:
        """Sample latents for prompts, with the arguments of Open-Sora 1.2's and 1.3's rflow, or of 1.0's and 1.1's iddpm.

        Args:
            model: The student; eval mode, gradients off (the host's scripts see to both).
            text_encoder: encode(prompts) and null(n); v1.3's tokenize_fn is used where there is one.
            z: Noise with reference frames already in place, [B, C, T, H, W], any float dtype.
            prompts: B prompts.
            device: Where to sample.
            additional_args: height, width, num_frames, fps, ar, [B] each; not changed.
            mask: Edit ratio of each frame, [B, T], see `sampler.FrameEdit`; None or ones generate everything.
            guidance_scale: Text guidance in mode sync, what the student is told in mode range; one number, or one a window;
                None: the config's cfg_scale, or the student's.
            image_cfg_scale: Guidance by reference frames in mode sync; None: as by text, as upstream.
            neg_prompts: B negative prompts, mode sync only (else guidance.negative in training).
            z_cond, mask_index: Reference latents and their frames (v1.3); z_cond_mask follows from mask_index.
            use_sdedit: Put the noised reference back onto its frames before each step.
            use_oscillation_guidance_for_text, use_oscillation_guidance_for_image: None: the config's.
            z_size: (C, T, H, W) of noise to draw in float32 where there is no z (v1.0).

        Returns:
            Latents, [B, C, T, H, W], float32. Network evaluations per sample: the number of steps in modes fixed and range.
            Mode sync takes twice as many, three times with reference frames; where the scales are 1, no more. An edit ratio
            between two grid points counts as a step, see `sampler.FrameEdit`.

        Raises:
            ValueError: neither or both of z and z_size; a scale outside the range of mode range; see conditions.py and
                iddpm.find_process.
        """
        network = unwrap(model)
        if self.run is None:  # sampled as loaded, not as trained since
            self.take_from(loaded_weights(), network)
        process, prediction = self.process_of(network)
        settings = self.settings
        if (z is None) == (z_size is None):
            raise ValueError(f"sample needs either z or z_size, got {'both' if z_size is not None else 'neither'}")
        if z is None:
            z = torch.randn(len(prompts), *z_size, device=device)
        sizes, x = dict(additional_args or {}), z.to(device).float()
        mask, reference = None if mask is None else mask.to(device), reference_of(z_cond, mask_index, device)
        idle = without_effect(
            settings.recipe.guidance, guidance_scale, neg_prompts, None if reference is None else image_cfg_scale
        )
        call = SamplingCall(
            model, network, text_encoder, x, prompts, sizes, mask, neg_prompts, reference, use_sdedit, progress
        )  # fmt: skip
        warnings = (*idle, *settings.crossing, *settings.other_scale(guidance_scale), *call.complete)
        self._log_once((logging.WARNING, warning) for warning in warnings)
        oscillate = (use_oscillation_guidance_for_text, use_oscillation_guidance_for_image)
        scales = self.step_scales(guidance_scale)
        guidance = StepGuidance.of(settings.recipe.guidance, self.keys, x.shape[2], scales, image_cfg_scale, oscillate)
        return sample_latents(call, self.grid, self.warped(sizes, x), guidance, process, prediction, settings.two_time)

    def take_from(self, weights: str | None, network: nn.Module) -> None:
        """Sample from here on as the student in `weights` was trained, where the config says nothing else.

        Raises:
            ValueError: see state.find_state and sampling_settings.as_trained.
        """
        self._forget_trained()
        found = None if weights is None else find_state(weights)
        if found is not None:
            stages = () if self.curriculum is None else self.curriculum.stages
            self._trained = as_trained(self.settings, self.given, stages, *found)
            self._process = self._prediction = None
            self.process_of(network)
            self._log_once(self._trained.report(found[0], self.state(), found[1]))

    @property
    def settings(self) -> SamplingSettings:
        """What the sampler goes by: the config, the curriculum's stage, or what `take_from` found."""
        recipe = self.recipe
        windows = recipe.windows if self.curriculum is None else self.curriculum.current
        return self._trained or SamplingSettings(recipe, self.keys, windows, recipe.draws.grids, None, recipe.draws.two_time)

    @property
    def windows(self) -> TimeWindows:
        """The windows of the config, of the curriculum's stage, or of the student that is sampled."""
        return self.settings.windows

    @property
    def grid(self) -> tuple[float, ...]:
        """The sampler's times, untransformed, from 1 to 0."""
        return self.settings.keys.grid(self.windows)

    def warped(self, sizes: Mapping[str, Any], x: Tensor) -> WarpedWindows:
        """The windows of each sample of latents x [B, ...], warped as the host's sampler warps its times."""
        return WarpedWindows(self.windows, len(x), self.keys.window_ratio(sizes), x.device)

    def step_scales(self, asked: float | Sequence[float] | None = None) -> list[float]:
        """The text scale of each sampling step: that of the window in which the step begins.

        Raises:
            ValueError: a scale outside the range that the student was trained for.
        """
        scales = self.settings.keys.scales(asked, self.windows.num_windows)
        self.settings.recipe.guidance.check_told(scales)
        starts = torch.tensor(self.grid[:-1], dtype=torch.float64)
        return [scales[k] for k in self.windows.lookup(starts).tolist()]

    def negative_text(self) -> dict[str, Tensor] | None:
        """The embedding of the recipe's negative prompt, read once; None without."""
        path = self.settings.recipe.guidance.negative
        if self._negative is None and path is not None:
            self._negative = read_negative(path)
        return self._negative

    def state(self) -> StudentState:
        """What has to be kept with a student's weights. To be asked after the first training step or sample."""
        return self._describe(self.run)

    def _describe(self, run: TrainingRun | None) -> StudentState:
        assert self._process is not None, "the network has not been seen yet"
        recipe = self.settings.recipe
        return StudentState(
            windows=self.windows.edges,
            transform=self.keys.transform_state(),
            path="ddpm" if isinstance(self._process, DDPM) else "linear",
            prediction=check_prediction(self._process, recipe.prediction),
            cfg_scale=None if recipe.guidance.folded or recipe.draws.starts != "student" else self.settings.keys.cfg_scale,
            adapters=None if run is None else record_of(run.teacher.network),
            **known_of(recipe, self.curriculum, run),
        )

    def process_of(self, network: nn.Module) -> tuple[Process, str]:
        """The process that the network was trained on, and what a student of the network outputs."""
        if self._process is None:
            recipe, keys = self.settings.recipe, self.settings.keys
            self._process = build_process(find_process(keys.path, network), recipe, keys)
        if self._prediction is None:
            self._prediction = self.settings.recipe.check_process(self._process)
        return self._process, self._prediction

    def _forget_trained(self) -> None:
        if self._trained is not None:
            self._trained = self._process = self._prediction = None

    def _log_once(self, messages: Iterable[tuple[int, str]]) -> None:
        for level, message in messages:
            if message not in self._said:
                self._said.add(message)
                logger.log(level, message)


def build_process(name: str, recipe: Recipe, keys: Keys) -> Process:
    """The process "linear" or "ddpm" with the host's numbers.

    Raises:
        ValueError: a prediction that the process has not.
    """
    process = Linear(int(keys.num_timesteps))
    if name == "ddpm":
        process = DDPM.from_schedule(keys.noise_schedule, int(keys.diffusion_steps))
    check_prediction(process, recipe.prediction)
    return process
