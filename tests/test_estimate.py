"""The estimator's arithmetic, where the answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from networks import tiny_network
from torch import nn

from opensora_perflow.hosts.outline import Bucket
from opensora_perflow.hosts.v2.outline import outline
from opensora_perflow.tools.activations import Cost, cost
from opensora_perflow.tools.cli import main
from opensora_perflow.tools.estimate import _print_parts
from opensora_perflow.tools.residents import residents
from opensora_perflow.tools.step_memory import GIB, Memory, changes, stored_bytes
from opensora_perflow.tools.step_units import Units
from opensora_perflow.training.recipe import Recipe

FIXED = dict(mode="fixed", scale=7.0)


@pytest.mark.parametrize(
    "recipe, units, forwards",
    [
        (None, (0, 0, 1), 4),  # the host's own
        (dict(guidance=FIXED), (1.5, 8, 2), 17.5),  # two midpoint steps, guided; half of three windows on the way
        (dict(), (3, 4, 2), 15),  # the student guided, the teacher not
        (dict(guidance=FIXED, teacher=dict(stored="store")), (0, 0, 2), 8),  # nothing is solved
        (dict(guidance=dict(mode="fixed", scale=1.0)), (1.5, 4, 2), 13.5),  # a teacher that needs none
        (
            dict(
                guidance=FIXED,
                teacher=dict(steps_per_window=8, solver="euler"),
                draws=dict(starts="diffused", edge_mass=0.0, per_solve=1),
            ),
            (0, 16, 1),
            20,
        ),  # the paper's
    ],
)
def test_evaluations_of_a_step(recipe, units, forwards):
    """A backward is two forwards; with checkpointing the forward runs twice."""
    found = Units.of(None if recipe is None else Recipe(**recipe))
    assert (found.way, found.teacher, found.trained) == units
    assert found.forwards(checkpointing=True, adapters=False) == forwards
    assert found.forwards(checkpointing=False, adapters=True) == forwards - 2 * found.trained


def test_residents_are_those_of_a_training():
    """In float32 and one process: every byte that torch's own optimizer and copies have."""
    network = tiny_network().train()
    for parameter in network.y_embedder.parameters():
        parameter.requires_grad_(False)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found = residents(network, 1, copied_teacher=True)
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    assert found["weights"] == found["teacher"] == found["EMA"] == size
    assert found["gradients"] == sum(parameter.grad.nbytes for parameter in trained)
    assert found["optimizer"] == sum(tensor.nbytes for tensor in moments)
    assert found["masters"] == 0


def test_shares_are_rounded_up():
    network = nn.Linear(5, 2).to(torch.bfloat16)  # 10 weights and 2 biases: 4 and 1 on each of 3 GPUs
    found = residents(network, 3, copied_teacher=False)
    assert found == {"weights": 24, "gradients": 10, "masters": 20, "optimizer": 40, "EMA": 20, "teacher": 0}
    assert residents(network, 3, copied_teacher=False, sharded_gradients=False, ema=False)["gradients"] == 24


def test_what_an_evaluation_keeps_and_computes():
    """A linear layer keeps its input, and a ReLU its output, which the next layer shares."""
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    found = cost(network, lambda: network(x))
    assert found == Cost(kept=4 * (3 * 4 + 3 * 8), checkpointed=4 * (3 * 4 + 3 * 8), block=0, flops=2 * 3 * (4 * 8 + 8 * 2))


MEMORY = Memory({"weights": 10, "gradients": 4, "teacher": 10}, Cost(100, 10, 5, 1), 2, True, 2)


def test_the_peak_is_the_largest_moment():
    assert MEMORY.resident == 20
    assert MEMORY.peak == 20 + 2 * 10 + 5  # the forward's end, beside the block that is computed anew
    assert Memory({**MEMORY.parts, "gradients": 50}, MEMORY.cost, 2, True, 2).peak == 20 + 10 + 5 + 50
    assert Memory({**MEMORY.parts, "gradients": 50}, MEMORY.cost, 1, True, 100).peak == 20 + 50 + 400  # the update
    assert MEMORY.activations(False, True) == [200, 25]


def test_what_to_change_is_what_fits():
    bucket = Bucket("a", 4, (1, 8, 8), (4, 1, 1, 1))
    parts = {"weights": GIB, "gradients": GIB, "masters": 2 * GIB, "optimizer": 4 * GIB, "EMA": 0, "teacher": 2 * GIB}
    memory = Memory({**parts, "text encoder": 9 * GIB}, Cost(8 * GIB, GIB, GIB // 2, 1), 2, False, 0)
    assert changes(bucket, memory, 30 * GIB) == [
        "grad_checkpoint=True (20.5 GiB)",
        "adapters (LoRA) (26.0 GiB)",
        "texts encoded beforehand (25.0 GiB)",
        "draws=dict(per_solve=1) (26.0 GiB)",
        "batch size 3 (30.0 GiB)",
    ]
    assert changes(bucket, memory, 13 * GIB) == ["grad_checkpoint=True, adapters (LoRA) (12.5 GiB)"]
    assert changes(bucket, memory, 11 * GIB) == ["grad_checkpoint=True, adapters (LoRA), batch size 1 (10.6 GiB)"]
    assert changes(bucket, memory, GIB) == ["more GPUs, or larger ones"]


def test_text_encoders_that_take_much_are_said_to_be_left_out(capsys):
    plan = SimpleNamespace(network=tiny_network())
    for texts, said in ((9, "take 9.5 GiB off"), (0, None)):
        _print_parts(plan, {"weights": GIB, "text encoder": texts * GIB, "CLIP": GIB // 2}, 1)
        printed = capsys.readouterr().out
        assert said in printed if said else "encoded once" not in printed


def test_a_config_of_20_without_buckets_is_told():
    with pytest.raises(ValueError, match="has no bucket_config; name the config of a training"):
        outline({"model": dict(type="perflow_flux")})


def test_a_store_over_data_keeps_the_latents_too():
    bucket = Bucket("a", 4, (1, 8, 8), (4, 5, 4, 4))
    for starts, states in (("student", 4), ("diffused", 5)):
        recipe = Recipe(draws=dict(starts=starts))
        assert stored_bytes(SimpleNamespace(recipe=recipe), bucket) == 2 * states * 4 * 5 * 4 * 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no.py"], "must be a config's file, got 'no.py'"),
        (["no.py", "--gpus", "0"], "--gpus must be an integer >= 1"),
        (["no.py", "--tflops", "-1"], "--tflops must be > 0"),
        (["no.py", "--memory", "nan"], "--memory must be"),
        (["no.py", "--json", "--steps", "4000"], "--json has seconds a step; leave out one or the other"),
        ([__file__, "--open-sora", "."], "--open-sora must be the root of an Open-Sora checkout"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message, capsys):
    assert main(["estimate", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
