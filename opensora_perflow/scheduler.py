"""`perflow`: the object that Open-Sora builds. It validates its config and wires the parts; the algorithms are elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.config import PeRFlowConfig, from_mapping, path_of_keys
from opensora_perflow.conventions import shift_time, unshift_time
from opensora_perflow.curriculum import Curriculum, held_out_error
from opensora_perflow.guidance import image_scale_ramp, oscillating_scale
from opensora_perflow.hosts import stdit
from opensora_perflow.hosts.host_path import find_path, guided_channels
from opensora_perflow.hosts.network import settle, text_dropout, unwrap
from opensora_perflow.hosts.ranks import mean_over_ranks
from opensora_perflow.hosts.run_config import check_teacher_source
from opensora_perflow.hosts.timestep_transform import installed_formula, is_image, shift_ratio
from opensora_perflow.hosts.variance import VarianceMatch
from opensora_perflow.objectives import WindowPair, combine, mean_over_frames
from opensora_perflow.overlap import place_windows
from opensora_perflow.paths import Bounds, DDPMPath, LinearPath, Path, check_prediction
from opensora_perflow.registry import SCHEDULERS
from opensora_perflow.sampling import FrameEdit, carry_to_windows, sample
from opensora_perflow.schedule import (
    WeightedTimes,
    draw_positions,
    draw_times,
    linear_grid,
    mix_in_edge,
    redraw_above,
    sampling_grid,
)
from opensora_perflow.solvers import Velocity, hold_frames
from opensora_perflow.teacher import check_finite, copy_frozen, load_teacher
from opensora_perflow.windows import TimeWindows

logger = logging.getLogger("opensora_perflow")


@dataclass(frozen=True)
class DrawnWindows:
    """A window for each sample of a batch, and the times at which the student is trained in it. All times float64."""

    window_idx: Tensor
    """[B], 0 is the noisiest."""
    ratio: Tensor | None
    """[B], the warp of the windows' edges; None where there is none."""
    route: Tensor
    """[R + 1, B], the steps of a sampler on its way to the window: route[window_idx] is the window's noisy edge."""
    solver_times: Tensor
    """[S + 1, B], the teacher's grid from the window's noisy edge to its clean one."""
    drawn: WeightedTimes
    """[n, B]."""

    @property
    def t_start(self) -> Tensor:
        return self.solver_times[0]

    @property
    def t_end(self) -> Tensor:
        return self.solver_times[-1]


@dataclass
class HeldOut:
    """A batch that a curriculum's stages are measured on."""

    student_condition: stdit.Condition
    teacher_condition: stdit.Condition
    start: Tensor
    """State at t = 1, [B, C, T, H, W]."""
    mask: Tensor | None
    frame_weights: Tensor | None
    ratio: Tensor | None
    """[B], the warp of the windows' edges."""
    states: Tensor | None = None
    """The teacher's, at the edges of the present stage, [K + 1, B, C, T, H, W]."""


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
        if previous is None or self._training_settings(previous) != self._training_settings(self.config):
            self._teacher: nn.Module | None = None
            self._curriculum: Curriculum | None = self.config.stages()
            self._held_out: list[HeldOut] = []
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
            x_start: Clean latents, [B, C, T, H, W]; never written to.
            model_args: y [B, 1, L, D], mask [B, L], and sizes [B]; also as `model_kwargs`.
            noise: Noise of the window starts, like x_start; drawn in float32 if None.
            mask: bool [B, T], True = generated frame; False frames stay clean and do not count.
            weights: Loss weight of each timestep, [num_timesteps] or None.
            t: Timesteps, [B]; drawn if None. On the linear path in [0, num_timesteps] and taken as already transformed, as
                upstream does; on the ddpm path indices 0..num_timesteps - 1.
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
        if isinstance(model_args, Tensor):
            t, model_args, noise = model_args, noise, None
        config, network = self.config, unwrap(model)
        model_args = dict(model_args or model_kwargs or {})
        path, prediction = self._path_of(network)
        teacher = self._teacher_of(model)
        data = x_start.detach().float()

        windows = self._draw_windows(path, data, model_args, t)
        t_start, t_end = windows.t_start, windows.t_end
        if noise_disable_threshold is not None and x_gt is not None:
            clean = t_start * self.num_timesteps > noise_disable_threshold
            data = torch.where(clean.to(data.device)[:, None, None, None, None], x_gt.detach().float(), data)
        noise = torch.randn_like(data) if noise is None else noise.float()
        still = path.add_noise(data, noise, torch.full_like(t_start, path.still_time))
        x_win_start = _hold(path.add_noise(data, noise, t_start), still, mask)

        drop = None
        if config.guidance.mode == "sync":
            probability = text_dropout(network) if text_uncond_prob is None or not network.training else text_uncond_prob
            drop = torch.rand(len(data), device=data.device) < probability if probability > 0 else None
        student_condition = stdit.training_condition(network, model_args, drop)
        teacher_condition = stdit.training_condition(teacher, model_args, drop)
        frame_weights = None if mask is None else mask.float()
        if mask_index is not None and len(mask_index) > 0:
            reference = stdit.Reference.of(x_start if x_noisy_ref is None else x_noisy_ref, mask_index)
            drawn = stdit.draw_reference_drop(config.drop_condition if config.guidance.mode == "sync" else None)
            student_condition, teacher_condition = (
                stdit.with_reference(c, reference, drawn) for c in (student_condition, teacher_condition)
            )
            frame_weights = stdit.reference_frame_weights(reference, config.x_cond_weight)

        if config.draws.starts != "diffused":
            reached = self._roll_out(path, prediction, model, student_condition, _hold(noise, still, mask), windows, mask)
            share = 1.0 if config.draws.starts == "student" else config.draws.student_share
            own = torch.rand(len(data), device=data.device) < share
            x_win_start = torch.where(own[:, None, None, None, None], reached, x_win_start)

        states = self._solve_teacher(path, teacher, teacher_condition, x_win_start, windows.solver_times, mask)
        pair = WindowPair(states[0], states[-1], t_start, t_end, states, windows.solver_times)
        keeps_variance = isinstance(path, DDPMPath) and prediction != "velocity" and config.learn_sigma
        variance = VarianceMatch(model, teacher) if keeps_variance and config.variance_weight > 0 else None
        output = stdit.prediction_field(
            variance or model, network, student_condition, to_timestep=path.to_timestep, frame_mask=mask
        )
        student = path.student(output, prediction, self._bounds(windows.ratio, drawn=(t_start, t_end)))
        loss = 0.0
        # One call of the network per time, not one with repeated rows: conditions are made for the batch as it is.
        for t, share in zip(windows.drawn.times, windows.drawn.weights):
            part = self._objective(student, pair, t, frame_weights)
            share = share * path.loss_weight(t, t_start, t_end, prediction)
            if weights is not None:
                index = path.to_timestep(t).long().clamp(max=len(weights) - 1)
                share = share * weights.to(share.device)[index]
            loss = loss + part * share.to(part.device, part.dtype)
        if variance is not None and variance.error is not None:
            loss = loss + config.variance_weight * mean_over_frames(variance.error, frame_weights)
        if self._curriculum is not None and torch.is_grad_enabled():  # not where losses are only evaluated
            if len(self._held_out) < self._curriculum.rule.batches:
                start = _hold(_fixed_noise(noise, seed=len(self._held_out)), still, mask)
                held = HeldOut(student_condition, teacher_condition, start, mask, frame_weights, windows.ratio)
                self._held_out.append(held)
            self._follow_curriculum(path, prediction, model)
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
        guidance_scale: float | None = None,
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
            guidance_scale: Text guidance in mode sync; None: the config's cfg_scale.
            image_cfg_scale: Guidance by reference frames in mode sync; None: the config's cfg_scale, as upstream.
            neg_prompts: B negative prompts, mode sync only.
            z_cond, mask_index: Reference latents and their frames (v1.3); z_cond_mask follows from mask_index.
            use_sdedit: Put the noised reference back onto its frames before each step.
            use_oscillation_guidance_for_text, use_oscillation_guidance_for_image: None: the config's.
            z_size: (C, T, H, W) of noise to draw in float32 where there is no z (v1.0).

        Returns:
            Latents, [B, C, T, H, W], float32. Network evaluations per sample: the number of steps with fixed guidance; twice
            that in mode sync (three times with reference frames), once where the scales are 1.

        Raises:
            ValueError: neither or both of z and z_size; see hosts.stdit and hosts.host_path.
        """
        config, network = self.config, unwrap(model)
        path, prediction = self._path_of(network)
        additional_args = dict(additional_args or {})
        if (z is None) == (z_size is None):
            raise ValueError(f"sample needs either z or z_size, got {'both' if z_size is not None else 'neither'}")
        if z is None:
            z = torch.randn(len(prompts), *z_size, device=device)
        x = z.to(device).float()
        synced = config.guidance.mode == "sync"
        if not synced and (guidance_scale is not None or neg_prompts is not None):
            self._warn_once("guidance is folded into the weights: guidance_scale and negative prompts have no effect")
        text_scale = (config.cfg_scale if guidance_scale is None else guidance_scale) if synced else 1.0
        image_scale = (config.cfg_scale if image_cfg_scale is None else image_cfg_scale) if synced else 1.0

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
                oscillating_scale(scale, step, config.force_num) if synced and on else scale
                for scale, on in zip((text_scale, image_scale), oscillate)
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
            )
            return path.student(output, prediction, bounds)

        before_step = None
        if use_sdedit and reference is not None:
            before_step = partial(stdit.put_back_reference, reference=reference, add_noise=path.add_noise)
        return sample(
            field_at,
            x,
            times,
            edit=None if mask is None else FrameEdit(mask.to(device), add_noise=path.add_noise),
            before_step=before_step,
            progress=progress,
        )

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

    def _draw_windows(self, path: Path, data: Tensor, model_args: Mapping[str, Any], timestep: Tensor | None) -> DrawnWindows:
        """Windows by a drawn or given time per sample, and the times inside them; a given time is the only one."""
        config, draws = self.config, self.config.draws
        draw_ratio, window_ratio = self._ratios(model_args, sampling=False), self._window_ratio(model_args)
        if timestep is not None:
            t = path.from_timestep(timestep)
        else:
            u = draw_times(
                len(data),
                distribution=config.sample_method,
                loc=config.loc,
                scale=config.scale,
                num_levels=self.num_timesteps if config.use_discrete_timesteps else None,
                device=data.device,
            )
            t = shift_time(u, draw_ratio)
            if config.uniform_over_threshold is not None and draw_ratio is not None and not is_image(model_args):
                t = redraw_above(t, config.uniform_over_threshold)
        placed = place_windows(self._partitions, unshift_time(t, window_ratio), overlap=draws.overlap)
        if self._curriculum is None:
            grid = linear_grid(placed.u_start, placed.u_end, config.teacher.steps_per_window)
        else:
            grids = self._curriculum.solver_grids(config.teacher.steps_per_window).to(t.device)
            grid = grids[placed.window_idx].T
        solver_times = shift_time(grid, window_ratio)
        drawn = WeightedTimes(t[None], torch.ones_like(t)[None])
        if timestep is None:
            positions = draw_positions(
                draws.per_solve - (draws.distribution == "host"),
                len(data),
                distribution="uniform" if draws.distribution == "host" else draws.distribution,
                beta=draws.beta,
                device=t.device,
            )
            times = shift_time(placed.times(positions), window_ratio)
            times = torch.cat([times, t[None]]) if draws.distribution == "host" else times
            drawn = mix_in_edge(times, solver_times[0], draws.edge_mass)
        route = shift_time(placed.route, window_ratio)
        return DrawnWindows(placed.window_idx, window_ratio, route, solver_times, drawn)

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
    ) -> Tensor:
        """Where the student, sampled with one step a window, reaches each sample's window."""
        config = self.config
        # Guided as it will be sampled. A network without a null text cannot be.
        scale = config.cfg_scale if config.guidance.mode == "sync" and condition.null is not None else 1.0
        output = stdit.prediction_field(
            model,
            unwrap(model),
            condition,
            to_timestep=path.to_timestep,
            frame_mask=frame_mask,
            text_scale=scale,
            image_scale=scale,
            guided_channels=self._guided_channels(path),
            flaw_fix=config.use_flaw_fix and scale != 1.0,
        )
        velocity = hold_frames(path.student(output, prediction, self._bounds(windows.ratio)), frame_mask)
        return carry_to_windows(velocity, noise, windows.route, windows.window_idx)

    @property
    def _partitions(self) -> list[TimeWindows]:
        """The windows, and the uniform grids that the student is trained for as well."""
        return [self._windows, *map(TimeWindows.uniform, self.config.draws.grids)]

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

    def _sampling_times(self, x: Tensor, model_args: Mapping[str, Any]) -> Tensor:
        steps = self.config.steps_over(self._windows)
        # With one window there is no edge to meet: the host's own grid.
        windows = self._windows if self.config.sampling_grid == "edges" else TimeWindows.uniform(1)
        grid = torch.tensor(sampling_grid(windows, steps), dtype=torch.float64)
        if self.config.use_discrete_timesteps:
            grid = torch.round(grid * self.num_timesteps) / self.num_timesteps
        grid = grid.to(x.device)[:, None].expand(-1, len(x))
        return shift_time(grid, self._window_ratio(model_args))

    def _window_ratio(self, model_args: Mapping[str, Any]) -> Tensor | None:
        """Warp of the window edges: the one of the host's sampler, so that each window holds whole sampling steps."""
        return self._ratios(model_args, sampling=True) if self.config.window_time == "host" else None

    def _ratios(self, model_args: Mapping[str, Any], *, sampling: bool) -> Tensor | None:
        config = self.config
        if not config.use_timestep_transform:
            return None
        formula = installed_formula() if config.transform == "auto" else config.transform
        # v1.2 applies transform_scale when it draws training times, v1.3 when it samples (HOST: rf/__init__.py of each tag).
        scale = config.transform_scale if sampling == (formula == "v1.3") else 1.0
        return shift_ratio(model_args, formula, scale=scale, scale_temporal=config.scale_temporal)

    def _teacher_of(self, model: nn.Module) -> nn.Module:
        if self._teacher is None:
            self._teacher_source = check_teacher_source(self.config.teacher)
            settle(model)
            self._teacher = load_teacher(unwrap(model), self.config.teacher.from_pretrained)
            if self._curriculum is not None and self._curriculum.teacher_is_student:
                logger.warning(
                    "PeRFlow curriculum: stage %d is taught by the student of the stage before; teacher.from_pretrained must "
                    "be the checkpoint at which this stage began, with teacher.allow_distilled=True",
                    self._curriculum.progress.stage + 1,
                )
            logger.info("PeRFlow teacher: %s", self._teacher_source)
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
    ) -> Tensor:
        """The teacher's states at `times` [S + 1, B]: [S + 1, B, C, T, H, W]."""
        guidance, method = self.config.guidance, self.config.teacher.solver
        scale = 1.0 if guidance.mode == "sync" else guidance.scale
        image_scale = scale if guidance.image_scale is None else guidance.image_scale
        distilled = self._curriculum is not None and self._curriculum.teacher_is_student
        if distilled:
            scale, image_scale, method = 1.0, 1.0, "euler"
        output = stdit.prediction_field(
            teacher,
            teacher,
            condition,
            to_timestep=path.to_timestep,
            frame_mask=frame_mask,
            text_scale=scale,
            image_scale=image_scale,
            guided_channels=self._guided_channels(path),
            flaw_fix=self.config.use_flaw_fix and guidance.mode == "fixed" and not distilled,
        )
        states = path.states(output, x, times, method=method, frame_mask=frame_mask)
        solution = torch.stack(list(states))
        check_finite(solution[-1], times[0], times[-1], self._teacher_source)
        return solution

    def _follow_curriculum(self, path: Path, prediction: str, model: nn.Module) -> None:
        """After a training step: measure where it is time to, and begin the next stage where this one has ended."""
        curriculum = self._curriculum
        if curriculum.wants_measurement():
            errors = [self._held_out_error(path, prediction, model, held) for held in self._held_out]
            error = mean_over_ranks(sum(errors) / len(errors), self._held_out[0].start.device)
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
                    settle(model)
                    self._teacher = copy_frozen(unwrap(model))
                    self._teacher_source = f"the student after stage {curriculum.progress.stage}"
                for held in self._held_out:
                    held.states = None
                return
        curriculum.progress.step += 1

    @torch.no_grad()
    def _held_out_error(self, path: Path, prediction: str, model: nn.Module, held: HeldOut) -> float:
        """See curriculum.held_out_error; the teacher's states are made once a stage."""
        grids = self._curriculum.solver_grids(self.config.teacher.steps_per_window).to(held.start.device)
        grids = shift_time(grids[:, :, None].expand(-1, -1, len(held.start)), held.ratio)  # [K, S + 1, B]
        if held.states is None:
            states = [held.start]
            for times in grids:
                solution = self._solve_teacher(path, self._teacher, held.teacher_condition, states[-1], times, held.mask)
                states.append(solution[-1])
            held.states = torch.stack(states)
        edges = torch.cat([grids[:, 0], grids[-1:, -1]])

        def bounds(t: Tensor) -> tuple[Tensor, Tensor]:
            window_idx = ((edges >= t).sum(dim=0) - 1)[None]  # t is one of the edges, to the last bit
            return edges.gather(0, window_idx)[0], edges.gather(0, window_idx + 1)[0]

        output = stdit.prediction_field(
            model, unwrap(model), held.student_condition, to_timestep=path.to_timestep, frame_mask=held.mask
        )
        return held_out_error(path.student(output, prediction, bounds), held.states, edges, held.frame_weights)

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
