import json
from copy import deepcopy

import pytest
import torch
from networks import CountCalls, sizes, text_encoder, tiny_network

from opensora_perflow import SCHEDULERS, build_module
from opensora_perflow.hosts.v1 import conditions, stdit
from opensora_perflow.method.grids import sampling_grid
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.planning.probe import Probe
from opensora_perflow.training.plan_file import FORMAT, read_plan, windows_of, write_plan

EDGES, GRIDS = (1.0, 0.7, 0.2, 0.0), ((1.0, 0.7, 0.5, 0.2, 0.0), (1.0, 0.2, 0.0))


@pytest.fixture
def plan(tmp_path):
    write_plan(tmp_path / "plan.json", EDGES, GRIDS, {"seed": 0})
    return tmp_path / "plan.json"


def test_what_was_written_is_read(plan, monkeypatch):
    assert read_plan(plan) == (EDGES, GRIDS)
    monkeypatch.chdir(plan.parent)
    assert windows_of("plan.json") == TimeWindows(EDGES, GRIDS) == windows_of(plan)


def test_a_planned_grid_serves_its_number_of_steps_and_no_other(plan):
    windows = windows_of(str(plan))
    assert sampling_grid(windows, 4) == GRIDS[0] and sampling_grid(windows, 2) == GRIDS[1]
    for steps in (1, 3, 5, 6):
        assert sampling_grid(windows, steps) == sampling_grid(TimeWindows(EDGES), steps)


def test_the_config_stays_as_the_host_wrote_it(plan):
    config = dict(type="perflow", windows=str(plan))
    again = json.loads(json.dumps(deepcopy(config)))
    scheduler = build_module(again, SCHEDULERS)
    assert again == config and scheduler.recipe.windows.edges == EDGES
    assert deepcopy(scheduler.recipe).windows == scheduler.recipe.windows


@pytest.mark.parametrize("grids, steps", [((), 3), (GRIDS[:1], 4), (GRIDS, 3)])
def test_default_number_of_steps(tmp_path, grids, steps):
    write_plan(tmp_path / "plan.json", EDGES, grids, {})
    config = dict(type="perflow", windows=str(tmp_path / "plan.json"))
    for changes, expected in ({}, steps), (dict(num_sampling_steps=7), 7):
        scheduler = build_module({**config, **changes}, SCHEDULERS)
        assert scheduler.keys.steps_over(scheduler.windows) == expected == len(scheduler.grid) - 1


@pytest.mark.parametrize("warped", [False, True])
def test_a_checkpoint_is_sampled_on_its_planned_grid_with_guidance(tmp_path, warped):
    grid = (1.0, 0.95, 0.8, 0.7, 0.5, 0.35, 0.3, 0.1, 0.0)
    write_plan(tmp_path / "plan.json", (1.0, 0.0), [grid], {})
    network = tiny_network()
    counter, encoder, z = CountCalls(network), text_encoder(network), torch.randn(2, 4, 5, 4, 4)
    prompts, arguments = ["a red circle", "a blue square"], sizes(2, side=360)
    config = dict(type="perflow", windows=str(tmp_path / "plan.json"), cfg_scale=3.0, use_timestep_transform=warped)
    scheduler = build_module(config, SCHEDULERS)
    with torch.no_grad():
        out = scheduler.sample(network, encoder, z, prompts, "cpu", additional_args=arguments, progress=False)
    assert (counter.calls, counter.samples) == (8, 2 * 2 * 8)  # 8 steps without being told so, both branches each
    condition = conditions.sampling_condition(
        network, encoder, prompts, negative_prompts=None, additional_args=arguments, reference=None, needs_null=True
    )
    velocity = stdit.velocity_field(network, network, condition, num_timesteps=1000, text_scale=3.0)
    ratio = scheduler.keys.window_ratio(arguments)
    assert (ratio is not None) == warped
    torch.testing.assert_close(out, Probe(velocity, z, ratio).sample(grid), atol=1e-6, rtol=0)  # the same float32 steps


def test_a_missing_plan_is_named_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"plan 'plam.json', which cannot be read from {tmp_path} .No such file"):
        build_module(dict(type="perflow", windows="plam.json"), SCHEDULERS)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "which is not JSON"),
        ("[]", 'is no plan: expected "format"'),
        ("[" * 10**5, "which is not JSON .it is nested too deeply"),
        (" " * (2**20 + 1), "which is not JSON .it is larger than 1048576 bytes"),
        ('{"format": "%s", "edges": [1, NaN, 0]}', "which is not JSON .NaN is no number"),
        ('{"format": "%s", "edges": [1, 0], "grids": {"a": 1}}', "is no whole plan"),
        ('{"format": "%s", "edges": [1, [0.5], 0]}', "plan.json: window edges must be finite numbers"),
        ('{"format": "%s", "edges": [' + "1, " * 2000 + "0]}", "plan.json: window edges must be a list of at most 1001 times"),
        ('{"format": "opensora_perflow.plan/0"}', "got 'opensora_perflow.plan/0'"),
        ('{"format": "%s"}', "is no whole plan"),
        ('{"format": "%s", "edges": [1, 0], "grids": [8]}', "is no whole plan"),
        ('{"format": "%s", "edges": [1, 0.2, 0.5, 0]}', "plan.json: window edges must descend strictly from 1 to 0"),
        ('{"format": "%s", "edges": [1, "x", 0]}', "plan.json: window edges must be finite numbers"),
        ('{"format": "%s", "edges": [1, 0], "grids": [[1, 0.5]]}', "plan.json: a plan's sampling grid must descend"),
        ('{"format": "%s", "edges": [1, 0], "grids": [[1, 0.5, 0], [1, 0.4, 0]]}', "one grid for a number of steps"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text.replace("%s", FORMAT))
    with pytest.raises(ValueError, match=message):
        windows_of(str(tmp_path / "plan.json"))


def test_a_folder_or_bytes_that_are_no_text_are_no_plan(tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"plan '.*folder.json', which cannot be read from .*it is no file"):
        windows_of(tmp_path / "folder.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="which is not JSON"):
        windows_of(tmp_path / "plan.json")
