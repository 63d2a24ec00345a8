"""The benchmarks' scripts still fit the package: each can be imported, and the comparison runs with very little work."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports(script, name):
    script(name)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_the_worlds_keep_everything_on_their_device(script, device):
    """What `--size gpu` needs."""
    few_step, recipes, worlds = script("few_step"), script("recipes"), script("worlds")
    scale = recipes.Scale(iterations=2, batch_size=2, lr=1e-4, num_samples=2)
    for world in (worlds.MixtureWorld(device), worlds.VideoWorld(device, num_clips=4)):
        evaluation = script("evaluation").Evaluation.of(world, 2, seed=0, floor=False, reference_steps=2)
        assert evaluation.endpoints.device.type == device
        for settings in (recipes.OURS, recipes.REFERENCE):
            recipe = recipes.Recipe("a student", settings, 2, steps=(4,))
            assert few_step.train(recipe, world, 0, evaluation, scale)["rows"][0]["endpoint_error"] > 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_comparison_of_two_recipes(script, tmp_path, device):
    few_step, recipes, tables, worlds = map(script, ("few_step", "recipes", "tables", "worlds"))
    world, scale = worlds.MixtureWorld(device), recipes.Scale(iterations=2, batch_size=8, lr=1e-3, num_samples=16)
    chosen = [recipes.Recipe("reference recipe", recipes.REFERENCE, 2, 16), recipes.Recipe("ours", recipes.OURS, 3, 16)]
    chosen.append(recipes.Recipe("ours, stored", recipes.OURS, 3, 16, chains=24, pilot=2))
    results = [few_step.run_seed(world, seed, chosen, scale) for seed in (0, 1)]
    rows = {(row["sampler"], row["steps"]): row for row in tables.summarise(results)}
    # A solution takes 8 Euler steps or 2 midpoint steps of 2 evaluations, guided: 16 or 8 evaluations a sample and step.
    # Two more are those of the first step's look at the teacher.
    assert rows["reference recipe", 4]["teacher_calls"] == 2 * 16 + 2
    assert rows["ours", 16]["teacher_calls"] == 3 * 8 + 2
    for result in results:
        (shares,) = {tuple(row["shares"]) for row in result["rows"] if row["sampler"] == "ours, stored"}
        assert len(shares) == 4 and min(shares) > 0
    # 24 chains of 4 windows, as many evaluations each; a store has no look.
    assert rows["ours, stored", 4]["teacher_calls"] == 24 * 4 * 8 / 8
    assert rows["host's rflow", 30]["endpoint_error"] < rows["host's rflow", 4]["endpoint_error"]
    text = tables.write(world, results, tmp_path, "a command")
    assert "| ours, 4 steps | 4 |" in text and "| ours (EMA), 4 steps | 4 |" in text
    assert text.count(" to ") == 2 * (4 + 3 * 2 * 3)  # intervals of error and energy in each row
    both = torch.cat([row["squared_errors"] for result in results for row in result["rows"][:1]])
    assert rows["host's rflow", 4]["error"].value == both.mean().sqrt().item()
    # the rule's average of three steps is the last step's weights, but for rounding
    assert rows["ours (EMA)", 4]["endpoint_error"] == pytest.approx(rows["ours", 4]["endpoint_error"], rel=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"mixture.json", "mixture.md", "mixture.png"}


def test_recipes_are_named_whole_or_in_part(script):
    few_step, recipes = script("few_step"), script("recipes")
    known = [recipes.Recipe(name, {}, 1) for name in ("ours", "ours, longer", "theirs, longer")]
    for asked, found in ((None, [0, 1, 2]), (["ours"], [0]), (["longer"], [1, 2]), (["ours", "theirs"], [0, 2])):
        assert few_step.select(known, asked) == [known[i] for i in found]


POOL = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from few_step import set_up_process
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), set_up_process) as pool:
        pool.submit(print, "works", flush=True).result()
        pool.submit(time.sleep, 600).result()
"""


def test_workers_end_with_the_process_that_was_killed(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    paths = [str(FOLDER), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen([sys.executable, str(tmp_path / "pool.py")], env=environment, stdout=subprocess.PIPE) as pool:
        assert pool.stdout.readline() == b"works\n"
        pool.kill()
        pool.communicate(timeout=60)  # raises while anyone, such as the worker, still holds the other end of the pipe


def test_damaged_weights_are_refused_by_name(script):
    ends = script("faults_files").damaged_files(150, seed=3)
    assert ends["raw"] == ends["silent"] == 0 and ends["told"] > 100, ends


def test_faults_are_named_and_a_healthy_run_is_left_alone(script):
    faults = script("faults")
    world = faults.make_world("mixture", None)
    for trial in faults.FAULTS:
        if trial.name in ("swapped edges", "dead EMA", "stale windows file"):
            assert faults.named(faults.run(world, trial, 0, 4, steps=10), trial), trial.name
    assert faults.run(world, faults.HEALTHY, 0, 4, steps=10).said == []
