"""`perflow`: the object that Open-Sora builds. It validates its config and wires the parts; the algorithms are elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.conventions import shift_time, unshift_time
from opensora_perflow.hosts.v1 import stdit
from opensora_perflow.hosts.v1.checkpoints import before_each_save, resumed_checkpoint
from opensora_perflow.hosts.v1.host_path import find_path, guided_channels
from opensora_perflow.hosts.v1.negative_text import read_negative
from opensora_perflow.hosts.v1.network import one_graph_a_step, settle, text_dropout, unwrap
from opensora_perflow.hosts.v1.parallel import data_parallel_rank, mean_over_ranks, shared
from opensora_perflow.hosts.v1.run_config import check_teacher_source, host_seed, loaded_weights
from opensora_perflow.hosts.v1.timestep_transform import installed_formula, shift_ratio
from opensora_perflow.hosts.v1.variance import VarianceMatch
from opensora_perflow.method.draws import DrawnWindows, draw_windows
from opensora_perflow.method.grids import linear_grid, sampling_grid
from opensora_perflow.method.guidance import draw_scales, image_scale_ramp, oscillating_scale, scale_of_window
from opensora_perflow.method.long_video import fade_change
from opensora_perflow.method.process import Bounds, DDPMPath, LinearPath, Path, check_prediction
from opensora_perflow.method.sampler import FrameEdit, carry_to_windows, sample
from opensora_perflow.method.solvers import Velocity, hold_frames
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.objectives import WindowPair, combine, mean_over_frames
from opensora_perflow.registry import SCHEDULERS
from opensora_perflow.training.curriculum import Curriculum
from opensora_perflow.training.monitor import HeldOutBatch, Watch
from opensora_perflow.training.randomness import TrainingRandomness
from opensora_perflow.training.recipe import PeRFlowConfig, as_scales, from_mapping, path_of_keys
from opensora_perflow.training.state import StudentState, check_resumed, find_state, sampling_mismatch, write_state
from opensora_perflow.training.teacher import check_finite, copy_frozen, fingerprint, load_teacher

logger = logging.getLogger("opensora_perflow")


@SCHEDULERS.register_module("perflow")
class PeRFlow:
    """PeRFlow for Open-Sora: `training_losses` distils a frozen teacher window by window, `sample` takes a few Euler steps.

    Built by the host from `scheduler=dict(type="perflow", ...)`; the keys are those of `config.PeRFlowConfig`. Construction
    is cheap and touches no weights. The teacher is made at the first training step and survives a repeated `__init__`
    (Open-Sora's gradio app re-initialises the live object) as long as its settings stay the same.

    Raises:
        ValueError: unknown keys or invalid values (received, accepted, remedy).
    """

    def __init__(self, **config: Any) -> None:
        previous: PeRFlowConfig | None = getattr(self, "config", None)
        config["path"] = path_of_keys(config)
        self.config: PeRFlowConfig = from_mapping(PeRFlowConfig, config, 'scheduler=dict(type="perflow")')
        known = find_path(self.config.path)
        self._path: Path | None = None if known is None else self._build_path(known)
        self.num_timesteps = int(self.config.diffusion_steps if known == "ddpm" else self.config.num_timesteps)
        self._objective = combine(self.config.objective)
        retaught = previous is None or self._training_settings(previous) != self._training_settings(self.config)
        if retaught:
            self._teacher: nn.Module | None = None
            self._curriculum: Curriculum | None = self.config.stages()
        if retaught or (previous.watch, previous.windows) != (self.config.watch, self.config.windows):
            self._held_out: list[HeldOutBatch] = []
            self._watch = None if self.config.watch is None else Watch(self.config.watch)
        if not hasattr(self, "_randomness"):
            self._randomness: TrainingRandomness | None = None
            self._stage, self._teacher_source, self._fingerprint = 1, None, None
        self._negative: dict[str, Tensor] | None = None
        self._warned: set[str] = set()

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
            t: Timesteps, [B]; drawn if None. On the linear path in [0, num_timesteps] and taken as already transformed, as
                upstream does; on the ddpm path indices 0..num_timesteps - 1. By name it is the only time that is trained; as
                1.0's and 1.1's third argument it is their train.py's draw, and `draws` adds to it as to one of ours.
            mask_index: Latent indices of reference frames (v1.3); None and [] both train text-to-video in the way it is
                sampled, without the reference embedders' biases.
            x_gt: Clean latents where x_start was degraded (v1.3). The target comes from the teacher, so they are used only
                above `noise_disable_threshold`.
            noise_disable_threshold: Timestep above which windows start from x_gt.
            text_uncond_prob: Probability of dropping a prompt; None: the network's own. Not used with fixed guidance.
            x_noisy_ref: Latents to take the reference frames from; x_start if None.

        Returns:
            dict(loss=[B] float32 with the student's graph). It is in units of the network's output, see
            predictions.output_gain; on the ddpm path the variance half's loss is added.

        Raises:
            ValueError: see teacher.load_teacher, hosts.run_config.check_teacher_source, hosts.stdit; a non-finite teacher.
        """
        drawn_by_host = isinstance(model_args, Tensor)  # as train.py of 1.0 and 1.1 does; else a given t is a question for it
        if drawn_by_host:
            t, model_args, noise = model_args, noise, None
        x_start, t, noise, mask, mask_index, x_gt, text_uncond_prob, x_noisy_ref = shared(
            x_start, t, noise, mask, mask_index, x_gt, text_uncond_prob, x_noisy_ref
        )
        config, network = self.config, unwrap(model)
        model_args = dict(model_args or model_kwargs or {})
        path, prediction = self._path_of(network)
        self._teacher_of(model)
        if self._randomness is None:
            self._begin(model)
        data = x_start.detach().float()

        teacher, generator = self._teacher, self._randomness.next_generator(data.device)
        windows = self._draw_windows(path, data, model_args, t, generator, drawn_by_host)
        t_start, t_end = windows.t_start, windows.t_end
        if noise_disable_threshold is not None and x_gt is not None:
            clean = t_start * self.num_timesteps > noise_disable_threshold
            data = torch.where(clean.to(data.device)[:, None, None, None, None], x_gt.detach().float(), data)
        noise = torch.randn(data.shape, device=data.device, generator=generator) if noise is None else noise.float()
        still = path.add_noise(data, noise, torch.full_like(t_start, path.still_time))
        x_win_start = _hold(path.add_noise(data, noise, t_start), still, mask)

        drop = None
        if not config.guidance.folded:
            probability = text_dropout(network) if text_uncond_prob is None or not network.training else text_uncond_prob
            drop = torch.rand(len(data), device=data.device, generator=generator) < probability if probability > 0 else None
        student_condition = stdit.training_condition(network, model_args, drop)
        teacher_condition = stdit.training_condition(teacher, model_args, drop, self._negative_text())
        frame_weights = None if mask is None else mask.float()
        if mask_index is not None and len(mask_index) > 0:
            reference = stdit.Reference.of(x_start if x_noisy_ref is None else x_noisy_ref, mask_index)
            drop_condition = None if config.guidance.folded else config.drop_condition
            drawn = stdit.draw_reference_drop(drop_condition, generator)
            student_condition, teacher_condition = (
                stdit.with_reference(c, reference, drawn) for c in (student_condition, teacher_condition)
            )
            frame_weights = stdit.reference_frame_weights(reference, config.x_cond_weight)

        scale = self._teacher_scale(windows.window_idx, generator)
        told = scale if config.guidance.mode == "range" else None
        if config.draws.starts == "student":
            start = _hold(noise, still, mask)
            x_win_start = self._roll_out(path, prediction, model, student_condition, start, windows, mask, told)

        states = self._solve_teacher(path, teacher, teacher_condition, x_win_start, windows.solver_times, mask, scale)
        bounds = self._bounds(windows.ratio, drawn=(t_start, t_end))
        units = path.output_units(prediction, bounds)
        pair = WindowPair(states[0], states[-1], t_start, t_end, states, windows.solver_times, units)
        keeps_variance = isinstance(path, DDPMPath) and prediction != "velocity" and config.learn_sigma
        call = one_graph_a_step(model, network) if drawn_by_host else model
        variance = VarianceMatch(call, teacher) if keeps_variance else None
        output = stdit.prediction_field(
            variance or call, network, student_condition, to_timestep=path.to_timestep, frame_mask=mask, told=told
        )
        # Frames that stand still have no velocity: an objective that steps with the student leaves them where they are.
        student = hold_frames(path.student(output, prediction, bounds), mask)
        loss = 0.0
        # One call of the network per time, not one with repeated rows: conditions are made for the batch as it is.
        for t, share in zip(windows.drawn.times, windows.drawn.weights):
            part = self._objective(student, pair, t, frame_weights)
            if weights is not None:
                index = path.to_timestep(t).long().clamp(max=len(weights) - 1)
                share = share * weights.to(share.device)[index]
            loss = loss + part * share.to(part.device, part.dtype)
        if variance is not None and variance.error is not None:
            loss = loss + mean_over_frames(variance.error, frame_weights)
        if mask_index is not None and len(mask_index) == 0 and torch.is_grad_enabled():
            settle(model)
            loss = loss + stdit.idle_reference_embedders(network)
        if torch.is_grad_enabled():  # not where losses are only evaluated
            if len(self._held_out) < self._held_out_batches:
                start = _hold(_fixed_noise(noise, seed=len(self._held_out)), still, mask)
                conditions = (student_condition, teacher_condition)
                held = self._hold_out(path, prediction, model, start, conditions, mask, told)
                self._held_out.append(replace(held, frame_weights=frame_weights, ratio=windows.ratio))
            self._measure_held_out(model)
        return {"loss": loss}

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
            mask: Edit ratio of each frame, [B, T], see `sampling.FrameEdit`; None or ones generate everything.
            guidance_scale: Text guidance in mode sync, what the student is told in mode range; one number, or one a window;
                None: the config's cfg_scale.
            image_cfg_scale: Guidance by reference frames in mode sync; None: the config's cfg_scale, as upstream.
            neg_prompts: B negative prompts, mode sync only (else guidance.negative in training).
            z_cond, mask_index: Reference latents and their frames (v1.3); z_cond_mask follows from mask_index.
            use_sdedit: Put the noised reference back onto its frames before each step.
            use_oscillation_guidance_for_text, use_oscillation_guidance_for_image: None: the config's.
            z_size: (C, T, H, W) of noise to draw in float32 where there is no z (v1.0).

        Returns:
            Latents, [B, C, T, H, W], float32. Network evaluations per sample: the number of steps in modes fixed and range;
            twice that in mode sync (three times with reference frames), once where the scales are 1. An edit ratio between
            two grid points counts as a step, see `sampling.FrameEdit`.

        Raises:
            ValueError: neither or both of z and z_size; a scale outside the range of mode range; see hosts.stdit and
                hosts.host_path.
        """
        config, network = self.config, unwrap(model)
        path, prediction = self._path_of(network)
        if self._randomness is None:  # sampled as loaded, not as trained since
            self._check_student(loaded_weights())
        additional_args = dict(additional_args or {})
        if (z is None) == (z_size is None):
            raise ValueError(f"sample needs either z or z_size, got {'both' if z_size is not None else 'neither'}")
        if z is None:
            z = torch.randn(len(prompts), *z_size, device=device)
        x = z.to(device).float()
        synced = not config.guidance.folded
        told = config.guidance.mode == "range"
        if (guidance_scale is not None and not synced and not told) or (neg_prompts is not None and not synced):
            self._warn_once("guidance is folded into the weights: guidance_scale and negative prompts have no effect")
        if mask_index is not None and len(mask_index) > 0 and image_cfg_scale is not None and not synced:
            folded = config.guidance.image_scale
            if image_cfg_scale != folded:
                self._warn_once(
                    "guidance by reference frames is folded into the weights, with "
                    + ("the scale of the text" if folded is None else f"scale {folded:g}")
                    + f": image_cfg_scale={image_cfg_scale:g} has no effect"
                )
        text_scales = self._step_scales(guidance_scale)
        image_scales = text_scales if image_cfg_scale is None or not synced else [image_cfg_scale] * len(text_scales)

        reference = None
        if mask_index is not None and len(mask_index) > 0:
            if z_cond is None:
                raise ValueError(f"mask_index {list(mask_index)} names reference frames, but z_cond is None; pass both")
            reference = stdit.Reference.of(z_cond.to(device).float(), mask_index)
        condition = stdit.sampling_condition(
            network,
            text_encoder,
            prompts,
            negative_prompts=neg_prompts,
            additional_args=additional_args,
            reference=reference,
            needs_null=synced,
        )
        times = self._sampling_times(x, additional_args)
        num_steps = len(times) - 1
        bounds, channels = self._bounds(self._window_ratio(additional_args)), self._guided_channels(path)
        oscillate = [
            config.use_oscillation_guidance if asked is None else asked
            for asked in (use_oscillation_guidance_for_text, use_oscillation_guidance_for_image)
        ]

        def field_at(step: int, frame_mask: Tensor | None) -> Velocity:
            text, image = (
                (oscillating_scale(scale, step, config.force_num) if on else scale) if synced else 1.0
                for scale, on in zip((text_scales[step], image_scales[step]), oscillate)
            )
            if synced and config.scale_image_weight and image > config.initial_image_scale:
                image = image_scale_ramp(image, config.initial_image_scale, step, num_steps, x.shape[2])
            output = stdit.prediction_field(
                model,
                network,
                condition,
                to_timestep=path.to_timestep,
                frame_mask=frame_mask,
                text_scale=text,
                image_scale=image,
                guided_channels=channels,
                flaw_fix=config.use_flaw_fix,
                told=torch.full((len(x),), text_scales[step], dtype=torch.float64) if told else None,
            )
            return path.student(output, prediction, bounds)

        before_step = None
        if use_sdedit and reference is not None:
            before_step = partial(stdit.put_back_reference, reference=reference, add_noise=path.add_noise)
        kept, given = None, x
        mask = None if mask is None else mask.to(device)
        if config.long_video is not None and reference is not None:
            kept, given = reference.mask[:, 0, :, 0, 0] == 1, reference.latents
        elif config.long_video is not None and mask is not None:
            kept = mask == 0
            mask = mask.masked_fill(kept, config.long_video.edit)
        clip = sample(
            field_at,
            x,
            times,
            edit=None if mask is None else FrameEdit(mask, add_noise=path.add_noise),
            before_step=before_step,
            progress=progress,
        )
        return clip if kept is None else fade_change(clip, given, kept, config.long_video.frames)

    @property
    def curriculum(self) -> Curriculum | None:
        """The stages of a run with fewer and fewer windows, and where it is among them; None without."""
        return self._curriculum

    @property
    def _windows(self) -> TimeWindows:
        """The windows of this config, or of this stage of its curriculum."""
        return self.config.windows if self._curriculum is None else self._curriculum.current

    @staticmethod
    def _training_settings(config: PeRFlowConfig) -> tuple[Any, ...]:
        return config.teacher, config.curriculum, config.curriculum and config.windows

    def _build_path(self, name: str) -> Path:
        config = self.config
        if name == "linear":
            path = LinearPath(int(config.num_timesteps))
        else:
            path = DDPMPath.from_schedule(config.noise_schedule, int(config.diffusion_steps))
        check_prediction(path, config.prediction)
        return path

    def _check_student(self, weights: str | None) -> None:
        found = None if weights is None else find_state(weights)
        mismatch = None if found is None else sampling_mismatch(found[0], self.state(), found[1])
        if mismatch is not None:
            self._warn_once(mismatch)

    def _path_of(self, network: nn.Module) -> tuple[Path, str]:
        """The path that the network was trained on, and what a student of it outputs."""
        if self._path is None:
            self._path = self._build_path(find_path(self.config.path, network))
        prediction = check_prediction(self._path, self.config.prediction)
        if prediction != "velocity" and (self.config.draws.overlap > 0 or self.config.draws.grids):
            raise ValueError(
                f'draws.overlap and draws.grids blend velocities, but prediction="{prediction}" means another velocity in '
                'every window; use prediction="velocity", or overlap=0 and grids=()'
            )
        distils_students = self._curriculum is not None and self._curriculum.teacher == "previous"
        if distils_students and isinstance(self._path, DDPMPath) and prediction != "ddim_eps":
            raise ValueError(
                f'curriculum.teacher="previous" lets students take DDIM steps over their windows on path="ddpm", which one '
                f'with prediction="{prediction}" was not trained for; use prediction="ddim_eps", or teacher="original"'
            )
        return self._path, prediction

    def _begin(self, model: nn.Module) -> None:
        """Start to count steps, from where a loaded checkpoint stopped, and have the next checkpoints say where that is."""
        seed = host_seed() if self.config.draws.seed is None else self.config.draws.seed
        loaded, steps = resumed_checkpoint(), 0
        found = None if loaded is None else find_state(loaded[0])
        if found is not None:
            state, where = found
            if self._curriculum is not None and state.curriculum is not None and loaded[1]:
                self._curriculum.restore(state.curriculum)
                self._curriculum.forget_errors()  # the batches that they were measured on are not kept
                if self._curriculum.teacher_is_student:
                    self._teach_by(model)  # the checkpoint does not hold the student that taught until now
            check_resumed(state, self.state(), where, self.config.allow_change)
            seed, steps = state.draws.get("seed") if seed is None else seed, state.steps if loaded[1] else 0
            logger.info("PeRFlow goes on after %d training steps (%s)", steps, where)
        elif loaded is not None:
            logger.info(
                "PeRFlow counts its steps from 0: %s has no perflow.json, so nothing is known of its windows", loaded[0]
            )
        (seed,) = shared(torch.initial_seed() if seed is None else seed)
        self._randomness = TrainingRandomness(seed, data_parallel_rank(), steps)
        before_each_save(lambda folder: write_state(folder, self.state()))

    def state(self) -> StudentState:
        """What has to be kept with a student's weights. To be asked after the first training step."""
        config, randomness = self.config, self._randomness
        assert self._path is not None, "the network has not been seen yet"
        transform = None
        if config.use_timestep_transform:
            transform = {"formula": self._formula, "scale": self._transform_scale, "scale_temporal": config.scale_temporal}
        draws = asdict(config.draws)
        return StudentState(
            windows=self._windows.edges,
            transform=transform,
            path="ddpm" if isinstance(self._path, DDPMPath) else "linear",
            prediction=check_prediction(self._path, config.prediction),
            guidance=asdict(config.guidance),
            teacher=self._fingerprint,
            teacher_source=self._teacher_source,
            stage=self._stage,
            curriculum=None if self._curriculum is None else self._curriculum.state(),
            objective=config.objective,
            draws=draws if randomness is None else {**draws, "seed": randomness.seed},
            steps=0 if randomness is None else randomness.steps,
        )

    def _draw_windows(
        self,
        path: Path,
        data: Tensor,
        model_args: Mapping[str, Any],
        timestep: Tensor | None,
        generator: torch.Generator,
        drawn_by_host: bool = False,
    ) -> DrawnWindows:
        """Windows by a drawn or given timestep per sample; one that is asked for is the only time that is trained."""
        given = None if timestep is None else path.from_timestep(timestep)
        return draw_windows(
            self.config,
            self._partitions,
            len(data),
            num_timesteps=self.num_timesteps,
            solver_grids=None if self._curriculum is None else self._solver_grids(),
            ratio=self._window_ratio(model_args),
            given=given,
            given_only=given is not None and not drawn_by_host,
            # 1.0 and 1.1 checkpoint gradients re-entrantly, which ZeRO's hooks bear for one evaluation a step.
            single=drawn_by_host and self.config.draws.per_solve is None,
            device=data.device,
            generator=generator,
        )

    @torch.no_grad()
    def _roll_out(
        self,
        path: Path,
        prediction: str,
        model: nn.Module,
        condition: stdit.Condition,
        noise: Tensor,
        windows: DrawnWindows,
        frame_mask: Tensor | None,
        told: Tensor | None,
    ) -> Tensor:
        """Where the student, sampled with one step a window, reaches each sample's window."""
        config = self.config
        edges = windows.route

        def output(x: Tensor, t: Tensor) -> Tensor:
            # Guided as it will be sampled. A network without a null text cannot be.
            synced = not config.guidance.folded and condition.null is not None
            # t is an edge, bit for bit: no window is looked up through the inverse of the warp.
            scale = scale_of_window(config.cfg_scale, (edges[:-1] >= t).sum(dim=0) - 1) if synced else 1.0
            return stdit.prediction_field(
                model,
                unwrap(model),
                condition,
                to_timestep=path.to_timestep,
                frame_mask=frame_mask,
                text_scale=scale,
                image_scale=scale,
                guided_channels=self._guided_channels(path),
                flaw_fix=config.use_flaw_fix and synced,
                told=told,
            )(x, t)

        velocity = hold_frames(path.student(output, prediction, self._bounds(windows.ratio)), frame_mask)
        return carry_to_windows(velocity, noise, windows.route, windows.window_idx)

    def _solver_grids(self) -> Tensor:
        """The teacher's steps in each window, [K, S + 1], float64, untransformed."""
        if self._curriculum is not None:
            return self._curriculum.solver_grids(self.config.teacher_steps)
        edges = torch.tensor(self._windows.edges, dtype=torch.float64)
        return linear_grid(edges[:-1], edges[1:], self.config.teacher_steps).T

    @property
    def _partitions(self) -> list[TimeWindows]:
        """The windows, and the uniform grids that the student is trained for as well."""
        grids = map(TimeWindows.uniform, self.config.draws.grids)
        if self.config.use_discrete_timesteps:
            grids = (windows.rounded(self.num_timesteps) for windows in grids)
        return [self._windows, *grids]

    def _bounds(self, ratio: Tensor | None, drawn: tuple[Tensor, Tensor] | None = None) -> Bounds:
        """t [B] -> (t_start, t_end) of the windows that times lie in, warped by `ratio` [B]; `drawn` ones hold their ends."""
        windows = self._windows

        def bounds(t: Tensor) -> tuple[Tensor, Tensor]:
            u_start, u_end = windows.bounds(windows.lookup(unshift_time(t, ratio)))
            t_start, t_end = shift_time(u_start, ratio), shift_time(u_end, ratio)
            if drawn is None:
                return t_start, t_end
            inside = (t <= drawn[0]) & (t >= drawn[1])
            return torch.where(inside, drawn[0], t_start), torch.where(inside, drawn[1], t_end)

        return bounds

    def _guided_channels(self, path: Path) -> int | None:
        """Channels that text guidance acts on: an iddpm's affair."""
        return guided_channels(self.config.cfg_channel) if isinstance(path, DDPMPath) else None

    def _grid(self) -> tuple[float, ...]:
        """The sampler's grid in untransformed time."""
        # With one window there is no edge to meet: the host's own grid.
        windows = self._windows if self.config.sampling_grid == "edges" else TimeWindows.uniform(1)
        grid = sampling_grid(windows, self.config.steps_over(self._windows))
        if not self.config.use_discrete_timesteps:
            return grid
        return tuple(round(u * self.num_timesteps) / self.num_timesteps for u in grid)

    def _sampling_times(self, x: Tensor, model_args: Mapping[str, Any]) -> Tensor:
        grid = torch.tensor(self._grid(), dtype=torch.float64, device=x.device)[:, None].expand(-1, len(x))
        return shift_time(grid, self._window_ratio(model_args))

    def _window_ratio(self, model_args: Mapping[str, Any]) -> Tensor | None:
        """Warp of the window edges: the one of the host's sampler, so that each window holds whole sampling steps."""
        config = self.config
        if not config.use_timestep_transform:
            return None
        return shift_ratio(model_args, self._formula, scale=self._transform_scale, scale_temporal=config.scale_temporal)

    @property
    def _formula(self) -> str:
        return installed_formula() if self.config.transform == "auto" else self.config.transform

    @property
    def _transform_scale(self) -> float:
        # v1.2 applies transform_scale when it draws training times, v1.3 when it samples (HOST: rf/__init__.py of each tag).
        return self.config.transform_scale if self._formula == "v1.3" else 1.0

    def _teacher_of(self, model: nn.Module) -> nn.Module:
        if self._teacher is None:
            source = self.config.teacher.from_pretrained
            self._teacher_source = check_teacher_source(self.config.teacher)
            settle(model)
            self._teacher = load_teacher(unwrap(model), source)
            self._fingerprint = fingerprint(self._teacher)
            weights = loaded_weights() if source is None else source
            taught = None if weights is None else find_state(weights)
            self._stage = 1 if taught is None else taught[0].stage + 1
            logger.info("PeRFlow teacher: %s (fingerprint %s)", self._teacher_source, self._fingerprint)
        return self._teacher

    @torch.no_grad()  # not inference_mode: the host's networks cache embeddings, which the student would meet in its graph
    def _solve_teacher(
        self,
        path: Path,
        teacher: nn.Module,
        condition: stdit.Condition,
        x: Tensor,
        times: Tensor,
        frame_mask: Tensor | None,
        scale: float | Tensor,
    ) -> Tensor:
        """The teacher's states at `times` [S + 1, B]: [S + 1, B, C, T, H, W]. `scale` is its guidance, of all or [B]."""
        config, guidance, told = self.config, self.config.guidance, None
        image_scale, method = scale if guidance.image_scale is None else guidance.image_scale, config.teacher.solver
        own_student = self._curriculum is not None and self._curriculum.teacher_is_student
        if own_student and guidance.mode == "range":
            told = torch.as_tensor(scale, dtype=torch.float64, device=x.device).expand(len(x))
        if own_student:
            method = "euler"
        if own_student or told is not None:
            scale = image_scale = 1.0
        output = stdit.prediction_field(
            teacher,
            teacher,
            condition,
            to_timestep=path.to_timestep,
            frame_mask=frame_mask,
            text_scale=scale,
            image_scale=image_scale,
            guided_channels=self._guided_channels(path),
            flaw_fix=config.use_flaw_fix and guidance.folded and told is None and not own_student,
            told=told,
        )
        states = path.states(output, x, times, method=method, frame_mask=frame_mask)
        solution = torch.stack(list(states))
        check_finite(solution[-1], times[0], times[-1], self._teacher_source)
        return solution

    def _teacher_scale(self, window_idx: Tensor, generator: torch.Generator | None = None) -> float | Tensor:
        """What guides the teacher in a training step: one scale, or one a sample [B]."""
        guidance = self.config.guidance
        if guidance.mode == "sync":
            return 1.0
        if guidance.mode == "range":
            return draw_scales(*guidance.scale, len(window_idx), device=window_idx.device, generator=generator)
        return scale_of_window(guidance.scale, window_idx)

    def _step_scales(self, asked: float | Sequence[float] | None) -> list[float]:
        """The text scale of each sampling step: that of the window in which the step begins."""
        config = self.config
        windows = self._windows
        scales = config.cfg_scale if asked is None else as_scales("guidance_scale", asked, windows.num_windows)
        scales = scales if isinstance(scales, tuple) else (scales,) * windows.num_windows
        if config.guidance.mode == "range":
            low, high = config.guidance.scale
            outside = [scale for scale in scales if not low <= scale <= high]
            if outside:
                raise ValueError(
                    f"the student takes guidance scales from {low:g} to {high:g}, for which it was trained "
                    f"(guidance.scale), got {outside[0]:g}; set cfg_scale, or guidance_scale=, to a scale in that range"
                )
        starts = torch.tensor(self._grid()[:-1], dtype=torch.float64)
        return [scales[k] for k in windows.lookup(starts).tolist()]

    def _negative_text(self) -> dict[str, Tensor] | None:
        if self._negative is None and self.config.guidance.negative is not None:
            self._negative = read_negative(self.config.guidance.negative)
        return self._negative

    @property
    def _held_out_batches(self) -> int:
        """Of the run's first batches so many are measured on."""
        return int(self._watch is not None or self._curriculum is not None)

    def _hold_out(
        self,
        path: Path,
        prediction: str,
        model: nn.Module,
        start: Tensor,
        conditions: tuple[stdit.Condition, stdit.Condition],
        frame_mask: Tensor | None,
        told: Tensor | None,
    ) -> HeldOutBatch:
        """A batch to measure on, with the conditions of student and teacher. Both networks are those of the time of asking.
        `told` are scales that hold in all windows; else each window has its own."""

        def solve(x: Tensor, times: Tensor, k: int) -> Tensor:
            scale = self._teacher_scale(torch.full((len(x),), k, device=x.device)) if told is None else told
            return self._solve_teacher(path, self._teacher, conditions[1], x, times, frame_mask, scale)

        def field(network: nn.Module, condition: stdit.Condition, bounds: Bounds) -> Velocity:
            output = stdit.prediction_field(
                network, unwrap(network), condition, to_timestep=path.to_timestep, frame_mask=frame_mask, told=told
            )
            return hold_frames(path.student(output, prediction, bounds), frame_mask)

        return HeldOutBatch(
            start,
            solve=solve,
            student=lambda bounds: field(model, conditions[0], bounds),
            untrained=lambda bounds: field(self._teacher, conditions[1], bounds),
        )

    def _measure_held_out(self, model: nn.Module) -> None:
        """After a training step: measure where it is time to, say so, and begin the next stage where one has ended."""
        watch, curriculum, steps = self._watch, self._curriculum, self._randomness.steps - 1  # the optimizer's step is to come
        complete = len(self._held_out) == self._held_out_batches  # else the errors of fewer batches would set the mark
        watched = complete and watch is not None and watch.wants_measurement(steps)
        staged = complete and curriculum is not None and curriculum.wants_measurement()
        grids = self._solver_grids() if watched or staged else None
        if watched:
            errors = (held.end_errors(grids) for held in self._held_out)
            level, text = watch.observe(steps, *(self._mean_held_out(values) for values in zip(*errors)))
            if self._randomness.rank == 0:  # the others would say the same
                logger.log(level, text)
        if staged:
            error = self._mean_held_out([held.velocity_error(grids) for held in self._held_out])
            if curriculum.observe(error):
                logger.info(
                    "PeRFlow curriculum: %d windows -> %d after %d steps; held-out velocity error %.4g, best %.4g",
                    curriculum.current.num_windows,
                    curriculum.stages[curriculum.progress.stage + 1].num_windows,
                    curriculum.progress.step,
                    error,
                    curriculum.progress.best,
                )
                curriculum.advance()
                if curriculum.teacher_is_student:
                    self._teach_by(model)
                for held in self._held_out:
                    held.forget()
                if watch is not None:
                    watch.restart()
                return
        if curriculum is not None:
            curriculum.progress.step += 1

    def _mean_held_out(self, errors: Sequence[float]) -> float:
        """Over the batches and over all processes, each of which has to call it."""
        return mean_over_ranks(sum(errors) / len(errors), self._held_out[0].start.device)

    def _teach_by(self, model: nn.Module) -> None:
        """The student as it is becomes the teacher of this stage. The fingerprint stays that of the original one."""
        settle(model)
        self._teacher = copy_frozen(unwrap(model))
        self._teacher_source = f"the student, as it came to stage {self._curriculum.progress.stage + 1} of the curriculum"

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def _fixed_noise(like: Tensor, seed: int) -> Tensor:
    """The same at every call, and none of it from the generator that training draws from."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def _hold(x: Tensor, still: Tensor, frame_mask: Tensor | None) -> Tensor:
    """Frames [B, T] that are False in the mask are those of `still`."""
    return x if frame_mask is None else torch.where(frame_mask[:, None, :, None, None], x, still)
