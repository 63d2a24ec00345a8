import copy
import json
from dataclasses import asdict, fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import CountCalls, batch, tiny_network

from opensora_perflow import SCHEDULERS, PeRFlow, build_module
from opensora_perflow.hosts.v1.keys import Keys, LongVideoConfig, read_config
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.training import recipe
from opensora_perflow.training.curriculum import AdvanceRule
from opensora_perflow.training.recipe import Recipe


def refused(match, **config):
    with pytest.raises(ValueError, match=match):
        build_module(dict(type="perflow", **config), SCHEDULERS)


def settings(scheduler):
    return scheduler.recipe, scheduler.keys


def sampling_steps(scheduler):
    return scheduler.keys.steps_over(scheduler.windows)


def test_type_alone_is_a_whole_config():
    scheduler = build_module(dict(type="perflow"), SCHEDULERS)
    assert isinstance(scheduler, PeRFlow)
    assert settings(scheduler) == (Recipe(), Keys()) == read_config({}) and scheduler.num_timesteps == 1000
    assert scheduler.recipe.windows == TimeWindows.uniform(4) and sampling_steps(scheduler) == 4


@pytest.mark.parametrize(
    "upstream",
    [
        dict(use_timestep_transform=True, sample_method="logit-normal"),  # v1.2 stage 1
        dict(use_timestep_transform=True, num_sampling_steps=30, cfg_scale=7.0),  # v1.2 sample
        dict(use_timestep_transform=True, num_sampling_steps=30, cfg_scale=7.5, use_oscillation_guidance=True,
             use_flaw_fix=True, transform_scale=2.0),  # v1.3 t2v
        dict(use_timestep_transform=True, num_sampling_steps=30, cfg_scale=7.5, scale_image_weight=True,
             initial_image_scale=1.0),  # v1.3 v2v
        dict(drop_condition=dict(null=0.05, cond=0.05, text=0.1, keep=0.8), x_cond_weight=0, uniform_over_threshold=0.9,
             scale_temporal=False, force_num=5, num_timesteps=1000, use_discrete_timesteps=False),
    ],
)  # fmt: skip
def test_upstreams_rflow_keys_are_accepted(upstream):
    scheduler = build_module(dict(type="perflow", **upstream), SCHEDULERS)
    assert {key: getattr(scheduler.keys, key) for key in upstream} == upstream


def test_config_survives_copy_and_json():
    config = dict(type="perflow", windows=[1, 0.5, 0], teacher=dict(steps_per_window=2), guidance=dict(mode="fixed", scale=7.0))
    config["draws"] = dict(starts="diffused", edge_mass=0.5, overlap=0.2, grids=[5, 6])
    again = json.loads(json.dumps(copy.deepcopy(config)))
    assert settings(build_module(again, SCHEDULERS)) == settings(build_module(config, SCHEDULERS))
    assert config["type"] == "perflow"  # building left it as it was


def test_init_may_run_again_on_a_live_object():
    scheduler, network = PeRFlow(num_sampling_steps=4), tiny_network()
    x, args = batch(network)
    scheduler.training_losses(network, x, args)
    teacher = scheduler.run.teacher
    scheduler.__init__(num_sampling_steps=8, cfg_scale=2.0)
    assert sampling_steps(scheduler) == 8 and scheduler.run.teacher is teacher
    # Another teacher's copy would be a copy of the student, which has been trained since.
    scheduler.__init__(teacher=dict(steps_per_window=3, solver="euler"))
    with torch.no_grad():
        network.final_layer.linear.bias += 0.5
    count = CountCalls(teacher.network)
    scheduler.training_losses(network, x, args)
    assert scheduler.run.teacher is teacher and count.calls == 3


@pytest.mark.parametrize("guidance", [{}, dict(guidance=dict(mode="fixed", scale=7.0))])
def test_every_position_of_gradios_sliders_is_accepted(guidance):
    scheduler = PeRFlow(**guidance)
    for steps, scale in [(1, 0.0), (2, 10.0), (3, 0.1), (100, 7), (200, 1.0)]:
        scheduler.__init__(**guidance, num_sampling_steps=steps, cfg_scale=scale)
        assert (sampling_steps(scheduler), scheduler.keys.cfg_scale) == (steps, scale)


def test_unknown_keys_name_the_closest_and_all_known_ones():
    refused(
        r"unknown key\(s\) 'window' in scheduler.*did you mean windows\?.*Known keys: windows, prediction.*, path, transform",
        window=4,
    )
    refused(r"unknown key\(s\) 'step' in teacher.*Known keys: from_pretrained", teacher=dict(step=4))


def test_invalid_values_say_what_is_accepted():
    refused("integer >= 1", windows=0)
    refused("must descend strictly", windows=[1, 0.2, 0.4, 0])
    refused("num_sampling_steps must be an integer >= 1, got 0", num_sampling_steps=0)
    refused("prediction must be one of auto, velocity, ddim_eps, diff_eps", prediction="x0")
    refused("needs an epsilon network", prediction="ddim_eps")
    refused("long_video must be a dict or None, got 2; write for example dict", long_video=2)
    refused("long_video.edit must be a number >= 0 and <= 1, got 2", long_video=dict(edit=2))
    refused("long_video.frames must be an integer >= 0, got -1", long_video=dict(frames=-1))
    refused("unknown key.*'frame' in long_video; did you mean frames", long_video=dict(frame=1))
    refused("transform must be one of auto, v1.2, v1.3", transform="v2")
    refused("sample_method must be one of uniform, logit-normal", sample_method="beta")
    refused("cfg_scale must be a number >= 0, got 'high'", cfg_scale="high")
    refused("transform_scale must be > 0", transform_scale=0)
    refused("scale must be a number, got None", scale=None)
    refused("use_discrete_timesteps needs sample_method", use_discrete_timesteps=True, sample_method="logit-normal")
    refused("a key of drop_condition must be one of null, cond, text, keep", drop_condition=dict(image=1))
    refused("drop_condition needs a positive weight", drop_condition=dict(keep=0))
    refused("uniform_over_threshold must be a number", uniform_over_threshold="x")


def test_teacher_and_guidance_settings_are_checked():
    refused("teacher must be a dict", teacher="checkpoint")
    refused("teacher.steps_per_window must be an integer >= 1", teacher=dict(steps_per_window=0))
    refused("teacher.solver must be one of midpoint, euler, got 'rk4'", teacher=dict(solver="rk4"))
    refused("teacher.from_pretrained must be a path", teacher=dict(from_pretrained=3))
    refused("teacher.allow_distilled must be True or False", teacher=dict(allow_distilled="yes"))
    refused("guidance.mode must be one of sync, fixed, range", guidance=dict(mode="free"))
    refused('mode "fixed" needs a scale', guidance=dict(mode="fixed"))
    refused('mode "sync" takes no scale', guidance=dict(scale=4.0))
    refused("guidance.scale must be a number", guidance=dict(mode="fixed", scale="7"))
    refused("guidance.image_scale must be a number", guidance=dict(mode="fixed", scale=7, image_scale="7"))
    refused('mode "sync" takes no scale.*got negative=', guidance=dict(negative="n.safetensors"))
    refused("guidance.negative must be the path", guidance=dict(mode="fixed", scale=7, negative=3))
    refused(r'mode "range" needs a scale.*scale=\(1.0, 9.0\)', guidance=dict(mode="range"))
    for scale in (7.0, [7.0], [7.0, 7.0], [9, 1], [1, 2, 3]):
        refused(r'mode "range" needs scale=\(low, high\) with low < high', guidance=dict(mode="range", scale=scale))
    refused(r"guidance.scale\[1\] must be a number >= 0, got -1", guidance=dict(mode="range", scale=[1, -1]))
    refused("guidance.scale must be one number, or one for each of the 4 windows", guidance=dict(mode="fixed", scale=[9, 7]))
    refused(r"cfg_scale must be one number, or one for each of the 2 windows.*got \[\]", cfg_scale=[], windows=2)


def test_lists_of_scales_survive_copy_and_json():
    config = dict(type="perflow", windows=2, cfg_scale=[9, 4.5], guidance=dict(mode="fixed", scale=(7.0, 3)))
    again = build_module(json.loads(json.dumps(copy.deepcopy(config))), SCHEDULERS)
    assert settings(again) == settings(build_module(config, SCHEDULERS))
    assert again.keys.cfg_scale == (9, 4.5) and again.recipe.guidance.scale == (7.0, 3)
    assert PeRFlow(guidance=dict(mode="range", scale=[1, 9])).recipe.guidance.scale == (1, 9)


def test_draws_are_checked():
    refused(r"unknown key\(s\) 'start' in draws; did you mean starts\?", draws=dict(start="student"))
    refused("draws must be a dict", draws="student")
    refused("draws.starts must be one of student, diffused, got 'noise'", draws=dict(starts="noise"))
    refused("draws.overlap must be a number >= 0 and <= 1, got 1.5", draws=dict(overlap=1.5))
    refused("draws.grids must be a list of numbers of steps, got 5; write", draws=dict(grids=5))
    refused("each of draws.grids must be an integer >= 1, got 2.5", draws=dict(grids=(5, 2.5)))
    refused("sampling_grid must be one of edges, uniform, got 'host'", sampling_grid="host")
    refused("draws.shares must be a list of numbers, one a window, got 5; write", draws=dict(shares=5))
    refused("each of draws.shares must be a number >= 0.001, got 0", draws=dict(shares=[1, 0, 1, 1]))
    refused(r"draws.shares must be one number a window, got \[1, 2\] for 4 windows", draws=dict(shares=[1, 2]))
    refused("draws.shares must each be at least 1e-05 of their sum", draws=dict(shares=[1e6, 1, 1, 1]))
    refused("windows by the timesteps that they hold", draws=dict(shares=[1, 2, 2, 1]), use_discrete_timesteps=True)
    for others in (dict(draws=dict(shares=[1, 2], grids=[5])), dict(curriculum=dict(windows=[4, 2]), draws=dict(shares=[1]))):
        refused("so shares of windows have no meaning, got draws.shares=", **others)
    refused("draws.edge_mass must be a number >= 0 and <= 1, got 1.5", draws=dict(edge_mass=1.5))
    refused("draws.edge_mass must be a number >= 0 and <= 1, got nan", draws=dict(edge_mass=float("nan")))
    refused("draws.per_solve must be an integer >= 1", draws=dict(per_solve=0))
    refused("draws.edge_mass=1 leaves one time in a window, got per_solve=2", draws=dict(edge_mass=1, per_solve=2))
    refused("whole timesteps.*draws.per_solve=1 or None, got 2", draws=dict(per_solve=2), use_discrete_timesteps=True)


def test_the_defaults_are_the_recipe_that_won():
    config = PeRFlow().recipe
    assert (config.windows.num_windows, config.teacher_steps, config.teacher.solver) == (4, 2, "midpoint")
    assert (config.draws.starts, config.draws.edge_mass, config.times_a_solve) == ("student", 0.75, 2)


@pytest.mark.parametrize(
    "windows, steps", [(1, 8), (2, 4), (3, 3), (4, 2), (8, 1), (16, 1), ([1, 0.6, 0], 4), ([1, 0.9, 0.5, 0.2, 0], 2)]
)
def test_the_teachers_steps_follow_the_number_of_windows(windows, steps):
    assert PeRFlow(windows=windows).recipe.teacher_steps == steps
    assert PeRFlow(windows=windows, teacher=dict(steps_per_window=5)).recipe.teacher_steps == 5


def test_paths_are_kept_as_text(tmp_path):
    config = PeRFlow(guidance=dict(mode="fixed", scale=2.0, negative=tmp_path / "negative.safetensors")).recipe
    assert config.guidance.negative == str(tmp_path / "negative.safetensors")


def test_the_widest_window_of_any_grid_has_its_steps():
    assert PeRFlow(windows=8, draws=dict(grids=[4, 1])).recipe.teacher_steps == 8
    assert PeRFlow(windows=4, draws=dict(grids=[5])).recipe.teacher_steps == 2


def test_one_time_a_solve_where_there_can_be_one_only():
    network = tiny_network()
    for changes, times in (
        (dict(draws=dict(edge_mass=0.0)), 2),
        (dict(draws=dict(edge_mass=1)), 1),
        (dict(use_discrete_timesteps=True), 1),
        (dict(use_discrete_timesteps=True, draws=dict(per_solve=1)), 1),
        (dict(draws=dict(per_solve=3)), 3),
    ):
        scheduler, seen = PeRFlow(**changes), []
        scheduler.objective = lambda student, segment, t, frame_weights: seen.append(t) or torch.zeros(2)  # noqa: B023
        scheduler.training_losses(network, *batch(network))
        assert len(seen) == times


def test_discrete_timesteps_round_the_windows():
    assert PeRFlow(windows=3, use_discrete_timesteps=True).recipe.windows.edges == (1.0, 0.667, 0.333, 0.0)
    refused("window edges must descend strictly", windows=[1, 0.5001, 0.5, 0], use_discrete_timesteps=True)


def test_objectives_are_checked():
    refused("objective must be one of perflow", objective="l1")
    refused("objective must be one of perflow", objective=3)
    refused(r"unknown key\(s\) \['power'\] for objective 'perflow'; known: weight", objective=dict(type="perflow", power=2))
    refused("at least one objective, got an empty list", objective=[])
    refused("weight of objective 'perflow' must be a number >= 0, got -1", objective=[dict(type="perflow", weight=-1)])
    refused(r"known: weight, target", objective=dict(type="perflow_consistency", goal="x"))


def test_a_config_without_type_is_refused():
    with pytest.raises(ValueError, match="needs a 'type' key"):
        build_module(dict(windows=4), SCHEDULERS)


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(curriculum=dict(windows=[4, 2])), "a curriculum merges windows"),
        (dict(draws=dict(grids=[5])), "draws.grids trains windows of other grids"),
    ],
)
def test_one_scale_a_window_needs_windows_that_stay(changes, why):
    with pytest.raises(ValueError, match=why + r", so one scale a window has no meaning, got guidance.scale=\[9, 7, 5, 3\]"):
        read_config(dict(guidance=dict(mode="fixed", scale=[9, 7, 5, 3]), **changes))
    with pytest.raises(ValueError, match=why + r".* got cfg_scale=\[9, 7, 5, 3\]; give one number"):
        read_config(dict(cfg_scale=[9, 7, 5, 3], **changes))


def test_a_refused_re_init_changes_nothing():
    scheduler, network = PeRFlow(windows=4), tiny_network()
    x, args = batch(network)
    scheduler.training_losses(network, x, args)
    recipe, run = scheduler.recipe, scheduler.run
    with pytest.raises(ValueError, match="needs an epsilon network"):
        scheduler.__init__(windows=2, path="linear", prediction="ddim_eps")
    assert scheduler.recipe is recipe and run.recipe is recipe and scheduler.windows.num_windows == 4
    scheduler.training_losses(network, x, args)


# --- types, at the door ---

SWITCHES = [
    "allow_change", "use_discrete_timesteps", "use_timestep_transform", "scale_temporal", "use_oscillation_guidance",
    "use_flaw_fix", "scale_image_weight", "learn_sigma",
]  # fmt: skip


class NeverEqual:
    def __eq__(self, other):
        raise RuntimeError("compared")


class Unprintable:
    def __repr__(self):
        raise RuntimeError("printed")


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_take_true_and_false_alone(name):
    for value in ("False", "yes", 1, 0, 1.0, None, [], np.array([True])):
        refused(f"{name} must be True or False, got ", **{name: value})
    for value in (True, np.True_, torch.tensor(True)):
        scheduler = PeRFlow(**{name: value})
        assert getattr(scheduler.recipe if name == "allow_change" else scheduler.keys, name) is True


def test_numbers_of_other_libraries_become_pythons():
    config = dict(
        windows=np.int64(3), num_sampling_steps=torch.tensor(6), num_timesteps=1000.0, cfg_scale=np.float64(2),
        force_num=np.int8(2), x_cond_weight=Fraction(1, 2), long_video=dict(edit=np.float64(0.5), frames=3.0),
        drop_condition=dict(keep=np.float64(0.5)), teacher=dict(steps_per_window=np.int32(2), from_pretrained=Path("t.pt")),
        draws=dict(seed=np.int64(7), grids=(np.int64(5), 6.0)), watch=dict(every=torch.tensor(50)),
        objective=dict(type=np.str_("perflow"), weight=torch.tensor(0.5)),
    )  # fmt: skip
    scheduler = build_module(dict(type="perflow", **config), SCHEDULERS)
    assert settings(copy.deepcopy(scheduler)) == settings(scheduler)
    text = json.loads(json.dumps([asdict(scheduler.recipe), asdict(scheduler.keys)]))
    assert text[0]["draws"]["grids"] == [5, 6] and text[0]["objective"] == {"type": "perflow", "weight": 0.5}
    assert text[1]["num_timesteps"] == 1000 and isinstance(text[1]["num_timesteps"], int)
    assert PeRFlow(cfg_channel=4.0).keys.cfg_channel == 4 and isinstance(PeRFlow(cfg_channel=4.0).keys.cfg_channel, int)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(drop_condition="auto"), r"drop_condition must be a dict or None, got 'auto'; write for example dict\(keep="),
        (dict(drop_condition={NeverEqual: 1}), "a key of drop_condition must be one of null, cond, text, keep"),
        (dict(windows=10**8), "the number of windows must be at most 1000, got 100000000; write windows=4"),
        (dict(windows=10**400), "the number of windows must be at most 1000, got 1000"),
        (dict(windows=10**5000), "at most 1000, got a value of type int"),
        (dict(windows=range(10**9)), "window edges must be a list of at most 1001 times"),
        (dict(windows=[1, 1 - 1e-9, 0]), "window edges must lie at least 1e-06 apart"),
        (dict(windows=b"4"), "windows must be a number of windows .*, got b'4'"),
        (dict(windows=nested(100_000)), "window edges must be finite numbers, got "),
        (dict(num_sampling_steps=float("inf")), "num_sampling_steps must be an integer >= 1, got inf"),
        (dict(num_sampling_steps=float("nan")), "num_sampling_steps must be an integer >= 1, got nan"),
        (dict(num_sampling_steps=10**8), "num_sampling_steps must be at most 10000, got 100000000"),
        (dict(teacher=dict(steps_per_window=1001)), "teacher.steps_per_window must be at most 1000"),
        (dict(draws=dict(per_solve=10**8)), "draws.per_solve must be at most 100"),
        (dict(draws=dict(grids=range(10**9))), "draws.grids takes at most 100 values, got 1000000000"),
        (dict(cfg_channel=2.5), "cfg_channel .* must be an integer >= 1, got 2.5"),
        (dict(cfg_channel=np.array([1, 2])), "cfg_channel .* must be an integer >= 1, got array"),
        (dict(cfg_scale=float("inf")), "cfg_scale must be finite, from 0 to 1000 in size, got inf"),
        (dict(cfg_scale=[1.0] * 10**6), "cfg_scale must be one number, or one for each"),
        (dict(guidance=dict(mode="fixed", scale=float("inf"))), "guidance.scale must be finite"),
        (dict(guidance=dict(mode="fixed", scale=2, image_scale=1e9)), "guidance.image_scale must be finite, from 0 to 1000"),
        (dict(guidance=dict(mode=NeverEqual())), "guidance.mode must be one of sync, fixed, range, got "),
        (dict(guidance={1: 2}), "unknown key.* 1 in guidance"),
        (dict(loc=float("nan")), "loc must be finite"),
        (dict(transform_scale=1e-300), "transform_scale must be finite, from 0.001 to 1000 in size, got 1e-300"),
        (dict(path=NeverEqual()), "path must be one of auto, linear, ddpm, got "),
        (dict(path=["ddpm"]), "path must be one of auto, linear, ddpm, got "),
        (dict(noise_schedule=np.array(["a"])), "noise_schedule must be one of"),
        (dict(timestep_respacing=[20]), "timestep_respacing must be an integer >= 1, got "),
        (dict(timestep_respacing="9" * 5000), "divides a diffusion into sections"),
        (dict(diffusion_steps=20), 'diffusion_steps must be > 20 with noise_schedule="linear"'),
        (dict(objective=""), "objective must be one of perflow"),
        (dict(objective="mmengine.perflow"), "objective must be one of perflow"),
        (dict(objective=nested(100_000)), "objective must hold words, numbers"),
        (
            dict(objective=dict(type="perflow", weight=1e300)),
            "weight of objective 'perflow' must be finite, from 0 to 1e.09 in size, got 1e.300",
        ),
        (
            dict(objective=dict(type="perflow_consistency", target=Unprintable())),
            "objective.target must hold words.*got <Unprintable instance",
        ),
        (dict(teacher=dict(from_pretrained="")), "teacher.from_pretrained must be a path, a repository id or None, got ''"),
        (dict(teacher=dict(from_pretrained="a\0b")), "teacher.from_pretrained must be a path"),
        (dict(watch=dict(tolerance=float("inf"))), "watch.tolerance must be finite"),
        (dict(self=1), r"unknown key.*'self' in scheduler"),
        (dict(guidance=dict(self=1)), r"unknown key.*'self' in guidance"),
    ],
)
def test_odd_values_are_refused_with_what_is_accepted(config, message):
    with pytest.raises(ValueError, match=message) as refusal:
        PeRFlow(**config)
    assert len(str(refusal.value)) < 2500


def test_every_key_names_the_kind_of_its_values():
    """Nothing is accepted unseen: a new key without a kind fails here."""
    records = (Recipe, Keys, LongVideoConfig, AdvanceRule, recipe.TeacherSettings, recipe.Guidance, recipe.Draws, recipe.Stages)
    for record in (*records, recipe.WatchSettings):
        assert [one.name for one in fields(record) if "kind" not in one.metadata] == []
