"""Every mode of guidance against its closed form, on a teacher that is linear in the state and in the text."""

import json
import os
import sys
from copy import deepcopy

import pytest
import torch
from networks import Reference13, batch, tiny_network
from safetensors.torch import load_file, save_file
from torch import nn

from opensora_perflow import PeRFlow
from opensora_perflow.hosts.scale_input import UNIT, direction, told
from opensora_perflow.hosts.v1 import conditions, stdit
from opensora_perflow.hosts.v1.embed import embed
from opensora_perflow.hosts.v1.negative_text import read_negative, write_negative
from opensora_perflow.hosts.v1.network import Interface
from opensora_perflow.method.guidance import draw_scales
from opensora_perflow.tools import cli
from opensora_perflow.training.recipe import Guidance

C, TOKENS = 3, 4
PROMPTS, LENGTHS = ["a cat", "a dog that runs"], [2, 4]


class Features(nn.Module):
    """The host's timestep features; `mlp` does nothing."""

    def __init__(self, channels=256):
        super().__init__()
        self.frequencies = 10000.0 ** -(torch.arange(channels // 2) / (channels // 2))
        self.mlp = nn.Identity()

    def plain(self, timestep):
        angle = timestep[:, None] * self.frequencies
        return torch.cat([angle.cos(), angle.sin()], dim=1)

    def forward(self, timestep):
        return self.mlp(self.plain(timestep))


class LinearText:
    """[B, 1, 4, 3] random embeddings, one a prompt, as long as LENGTHS says; the null text is one of them."""

    def __init__(self, network):
        self.null_text = network.y_embedder.y_embedding

    def encode(self, prompts):
        y = torch.stack([torch.randn(TOKENS, C, generator=torch.Generator().manual_seed(len(p))) for p in prompts])[:, None]
        length = torch.tensor([LENGTHS[PROMPTS.index(p)] if p in PROMPTS else 3 for p in prompts])
        return {"y": y, "mask": (torch.arange(TOKENS) < length[:, None]).long()}

    def null(self, n):
        return self.null_text.expand(n, 1, TOKENS, C)


class Linear(nn.Module):
    """dx/dt = A x + b(text), b the mean of the text's tokens; told a scale w it is A x + b(null) + w (b(text) - b(null))."""

    def __init__(self, strength=0.5):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = nn.Parameter(strength * torch.randn(C, C, generator=generator))
        self.y_embedder = nn.Module()
        self.y_embedder.register_buffer("y_embedding", torch.randn(TOKENS, C, generator=generator))
        self.y_embedder.uncond_prob = 0.0
        self.t_embedder = Features()
        self.told, self.rows = [], 0

    def forward(self, x, timestep, y, mask=None):
        toward = direction(256).float()
        moved = (self.t_embedder(timestep) - self.t_embedder.plain(timestep)) @ toward / toward.square().sum()
        self.told.append(1 + UNIT * moved)
        self.rows += len(x)
        mask = mask.repeat(len(x) // len(mask), 1)  # as the host tiles it
        text, null = (mean_text(v, mask) for v in (y, self.y_embedder.y_embedding.expand_as(y)))
        b = null + self.told[-1][:, None] * (text - null)
        return -(torch.einsum("ij,bjthw->bithw", self.matrix, x) + b[:, :, None, None, None])


def mean_text(y, mask):
    return (y[:, 0] * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def euler_steps(x, matrix, b, h):
    """Where n Euler steps h [n] of dx/dt = A x + b_i go: prod (1 + h_i A) x + sum_i prod_{j>i} (1 + h_j A) h_i b_i, float64.

    x [C], b [n, C].
    """
    gains = [torch.eye(C, dtype=torch.float64) + step * matrix.double() for step in h]
    result, after = torch.zeros(C, dtype=torch.float64), torch.eye(C, dtype=torch.float64)
    for gain, step, text in zip(gains[::-1], list(h)[::-1], b.double().flip(0)):
        result, after = result + after @ (step * text), after @ gain
    return result + after @ x.double()


def inputs(network, prompts=PROMPTS):
    encoded = LinearText(network).encode(prompts)
    x = torch.randn(len(prompts), C, 2, 2, 2)
    texts = mean_text(encoded["y"], encoded["mask"])
    nulls = mean_text(network.y_embedder.y_embedding.expand_as(encoded["y"]), encoded["mask"])  # cut to the prompt's length
    return x, encoded, texts, nulls


def trained_segment(scheduler, network, x, encoded, t):
    seen = {}

    def record(student, segment, t, frame_weights):
        seen["segment"] = segment
        return student(segment.point(t), t).flatten(1).mean(dim=1)

    scheduler.objective = record
    seen["loss"] = scheduler.training_losses(network, x, encoded, t=t)["loss"]
    return seen["segment"]


def assert_solved(segment, matrix, b, steps):
    """x_end is what `steps` Euler steps across the window make of x_start, for each sample's b [B, C]."""
    for i in range(len(b)):
        h = torch.full((steps,), (segment.t_end[i] - segment.t_start[i]).item() / steps, dtype=torch.float64)
        exact = euler_steps(segment.x_start[i, :, 1, 0, 1], matrix, b[i].expand(steps, C), h)
        # float32 against float64, values of order 1
        torch.testing.assert_close(segment.x_end[i, :, 1, 0, 1].double(), exact, rtol=1e-5, atol=1e-5)


T = torch.tensor([900.0, 100.0])  # windows 0 and 3 of 4


def test_sync_learns_the_unguided_flow_and_that_of_the_null_text():
    network = Linear().train()
    x, encoded, texts, nulls = inputs(network)
    scheduler = PeRFlow(teacher=dict(steps_per_window=3, solver="euler"))
    assert_solved(trained_segment(scheduler, network, x, encoded, T), network.matrix, texts, 3)
    network.y_embedder.uncond_prob = 1.0
    assert_solved(trained_segment(scheduler, network, x, encoded, T), network.matrix, nulls, 3)


def test_fixed_learns_the_guided_flow():
    network = Linear().train()
    x, encoded, texts, nulls = inputs(network)
    scheduler = PeRFlow(guidance=dict(mode="fixed", scale=7.0), teacher=dict(steps_per_window=3, solver="euler"))
    assert_solved(trained_segment(scheduler, network, x, encoded, T), network.matrix, nulls + 7 * (texts - nulls), 3)


def test_fixed_guides_each_window_with_its_own_scale():
    network = Linear().train()
    x, encoded, texts, nulls = inputs(network)
    scheduler = PeRFlow(guidance=dict(mode="fixed", scale=[9, 7, 5, 3]), teacher=dict(steps_per_window=3, solver="euler"))
    scale = torch.tensor([[9.0], [3.0]])
    assert_solved(trained_segment(scheduler, network, x, encoded, T), network.matrix, nulls + scale * (texts - nulls), 3)


def test_range_guides_each_sample_with_a_drawn_scale_and_tells_the_student():
    network = Linear().train()
    prompts = PROMPTS * 8
    x, encoded, texts, nulls = inputs(network, prompts)
    scheduler = PeRFlow(guidance=dict(mode="range", scale=(1.0, 9.0)), teacher=dict(steps_per_window=3, solver="euler"))
    segment = trained_segment(scheduler, network, x, encoded, torch.linspace(50, 950, 16))
    told = network.told[-1].detach()
    assert told.min() >= 1 and told.max() <= 9 and told.std() > 1
    # The scale is read off float32 features of norm 11: 1e-5 of it.
    b = nulls + told[:, None] * (texts - nulls)
    for i in range(16):
        h = torch.full((3,), (segment.t_end[i] - segment.t_start[i]).item() / 3, dtype=torch.float64)
        exact = euler_steps(segment.x_start[i, :, 0, 0, 0], network.matrix, b[i].expand(3, C), h)
        torch.testing.assert_close(segment.x_end[i, :, 0, 0, 0].double(), exact, rtol=1e-4, atol=1e-4)
    # The teacher is guided, not told.
    assert all(torch.equal(told, torch.ones_like(told)) for told in scheduler.run.teacher.network.told)


def test_a_student_that_answers_its_scale_has_no_loss():
    network = Linear(strength=0.0).train()  # windows are straight
    x, encoded, *_ = inputs(network)
    loss = PeRFlow(guidance=dict(mode="range", scale=(1, 9))).training_losses(network, x, encoded)["loss"]
    assert loss.max() < 1e-7  # a rounding of b, 1e-6 at scale 9, divided by the window's 1/4, squared
    loss = PeRFlow(guidance=dict(mode="fixed", scale=5.0)).training_losses(network, x, encoded)["loss"]
    assert loss.min() > 0.1


def test_a_negative_prompt_takes_the_place_of_the_null_text(tmp_path):
    network = Linear().train()
    write_negative(tmp_path / "ugly.safetensors", LinearText(network), "ugly")
    x, encoded, texts, _ = inputs(network)
    negative = LinearText(network).encode(["ugly"])
    away = mean_text(negative["y"], negative["mask"])  # of its own length, not the prompt's
    for mode, scale in ("fixed", 4.0), ("fixed", [4.0, 1.0, 1.0, 4.0]), ("range", (4.0, 4.0001)):
        guidance = dict(mode=mode, scale=scale, negative=str(tmp_path / "ugly.safetensors"))
        scheduler = PeRFlow(guidance=json.loads(json.dumps(guidance)), teacher=dict(steps_per_window=2, solver="euler"))
        segment = trained_segment(scheduler, network, x, encoded, T)
        b = away + 4 * (texts - away)
        for i in range(2):
            h = torch.full((2,), -0.125, dtype=torch.float64)
            exact = euler_steps(segment.x_start[i, :, 0, 0, 0], network.matrix, b[i].expand(2, C), h)
            torch.testing.assert_close(segment.x_end[i, :, 0, 0, 0].double(), exact, rtol=1e-4, atol=1e-3)


def test_negative_files_are_checked(tmp_path):
    network = Linear()
    path = tmp_path / "n.safetensors"
    write_negative(path, LinearText(network), "ugly")
    assert {name: list(value.shape) for name, value in read_negative(path).items()} == {"y": [1, 4, 3], "mask": [1, 4]}
    with pytest.raises(ValueError, match=r"written as .safetensors, got '.*n.pt'"):
        write_negative(tmp_path / "n.pt", LinearText(network), "ugly")
    with pytest.raises(ValueError, match="cannot be read.*opensora-perflow embed"):
        read_negative(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        read_negative(tmp_path / "text.safetensors")
    for content in ({"y": torch.zeros(1, 4, 3)}, {"y": torch.zeros(2, 4, 3), "mask": torch.ones(2, 4)}):
        save_file(content, path)
        with pytest.raises(ValueError, match=r"must hold y \[1, L, D\] and mask \[1, L\], got"):
            read_negative(path)
    for y, mask in (
        (torch.full((1, 4, 3), torch.nan), torch.ones(1, 4)),
        (torch.ones(1, 4, 3).int(), torch.ones(1, 4)),
        (torch.ones(1, 4, 3), torch.zeros(1, 4)),
    ):
        save_file({"y": y, "mask": mask}, path)
        with pytest.raises(ValueError, match="n.safetensors' must hold finite numbers y and a mask that marks tokens"):
            read_negative(path)
    os.truncate(path, 2**26 + 1)
    with pytest.raises(ValueError, match=r"n.safetensors' cannot be read .it is larger than 67108864 bytes.; write it with"):
        read_negative(path)
    save_file({"y": torch.zeros(1, 4, 5), "mask": torch.ones(1, 4)}, path)
    x, encoded, *_ = inputs(network)
    with pytest.raises(ValueError, match=r"negative prompt's y is \[1, 4, 5\], which does not go with .*\[2, 1, 4, 3\]"):
        PeRFlow(guidance=dict(mode="fixed", scale=2.0, negative=str(path))).training_losses(network, x, encoded)
    assert load_file(str(path))["y"].shape == (1, 4, 5)


# --- sampling ---


@torch.no_grad()
def sampled(scheduler, network, z, **arguments):
    return scheduler.sample(network, LinearText(network), z, PROMPTS, "cpu", progress=False, **arguments)


def assert_sampled(out, network, z, b, steps):
    """b [steps, B, C]: the guided text of each step."""
    h = torch.full((steps,), -1.0 / steps, dtype=torch.float64)
    for i in range(2):
        exact = euler_steps(z[i, :, 1, 1, 0], network.matrix, b[:, i], h)
        torch.testing.assert_close(out[i, :, 1, 1, 0].double(), exact, rtol=1e-4, atol=1e-4)  # float32, values to 30


@pytest.mark.parametrize(
    "guidance, evaluations", [(dict(mode="sync"), 2), (dict(mode="range", scale=(1, 9)), 1)], ids=["sync", "range"]
)
@pytest.mark.parametrize("scale, steps", [(6.0, 4), (6.0, 3), ([9, 7, 5, 3], 4), ([9, 7, 5, 3], 8)])
def test_sampling_with_one_scale_or_one_a_window(guidance, evaluations, scale, steps):
    network = Linear().eval()
    x, _, texts, nulls = inputs(network)
    windows = 3 if steps == 3 else 4
    each = torch.tensor(scale if isinstance(scale, list) else [scale] * windows).repeat_interleave(steps // windows)
    b = nulls + each[:, None, None] * (texts - nulls)
    settings = dict(windows=windows, guidance=guidance, num_sampling_steps=steps)
    for scheduler, asked in (PeRFlow(cfg_scale=scale, **settings), {}), (PeRFlow(**settings), dict(guidance_scale=scale)):
        network.rows = 0
        assert_sampled(sampled(scheduler, network, x, **asked), network, x, b, steps)
        assert network.rows == 2 * steps * evaluations


def test_sampling_with_negative_prompts():
    network = Linear().eval()
    x, _, texts, _ = inputs(network)
    negative = LinearText(network).encode(["ugly", "bad"])
    away = mean_text(negative["y"], negative["mask"])
    out = sampled(PeRFlow(cfg_scale=3.0), network, x, neg_prompts=["ugly", "bad"])
    assert_sampled(out, network, x, (away + 3 * (texts - away)).expand(4, -1, -1), 4)


def test_folded_guidance_is_sampled_as_it_is():
    network = Linear().eval()
    x, _, texts, _ = inputs(network)
    out = sampled(PeRFlow(guidance=dict(mode="fixed", scale=[9, 7, 5, 3])), network, x)
    assert_sampled(out, network, x, texts.expand(4, -1, -1), 4)


@pytest.mark.parametrize("scale", [0.5, 9.5, [9, 7, 5, 0]])
def test_a_scale_outside_the_range_is_refused(scale):
    network = Linear().eval()
    scheduler = PeRFlow(guidance=dict(mode="range", scale=(1, 9)))
    with pytest.raises(ValueError, match=r"takes guidance scales from 1 to 9, for which it was trained .*, got (0.5|9.5|0);"):
        sampled(scheduler, network, inputs(network)[0], guidance_scale=scale)
    with pytest.raises(ValueError, match="from 1 to 9"):
        sampled(PeRFlow(cfg_scale=scale, guidance=dict(mode="range", scale=(1, 9))), network, inputs(network)[0])


def test_a_list_of_scales_needs_one_a_window():
    network = Linear().eval()
    with pytest.raises(ValueError, match=r"guidance_scale must be .* each of the 4 windows.*got \[3, 2\]"):
        sampled(PeRFlow(), network, inputs(network)[0], guidance_scale=[3, 2])


@pytest.mark.parametrize("guidance", [dict(mode="sync"), dict(mode="range", scale=(5.0, 5.0001))], ids=["sync", "range"])
def test_student_starts_are_guided_as_the_student_is_sampled(guidance):
    network = Linear().eval()
    x, encoded, texts, nulls = inputs(network)
    cfg = [9, 7, 5, 3] if guidance["mode"] == "sync" else 5.0
    scheduler = PeRFlow(draws=dict(starts="student"), guidance=guidance, cfg_scale=cfg)
    noise, seen = torch.randn_like(x), []
    scheduler.objective = lambda student, segment, t, w: seen.append(segment) or torch.zeros(2)
    scheduler.training_losses(network, x, encoded, noise=noise, t=torch.tensor([100.0, 400.0]))
    scales = torch.tensor([9.0, 7.0, 5.0] if guidance["mode"] == "sync" else [5.0] * 3)
    for i, steps in enumerate((3, 2)):  # windows 3 and 2
        b = nulls[i] + scales[:steps, None] * (texts[i] - nulls[i])
        exact = euler_steps(noise[i, :, 0, 0, 0], network.matrix, b, torch.full((steps,), -0.25, dtype=torch.float64))
        torch.testing.assert_close(seen[0].x_start[i, :, 0, 0, 0].double(), exact, rtol=1e-4, atol=1e-3)


# --- its parts ---


def test_reference_frames_are_guided_with_the_scale_of_each_sample():
    network = Reference13().eval()
    x, args = batch(network)
    reference = conditions.Reference.of(x, [0])
    condition = conditions.with_reference(conditions.training_condition(Interface.of(network), args), reference, (False, False))
    t, scales = torch.tensor([0.9, 0.4], dtype=torch.float64), [2.0, 5.0]

    def output(text, image):
        return stdit.network_output(network, network, condition, text_scale=text, image_scale=image)(x, 1000 * t)

    together = torch.tensor(scales, dtype=torch.float64)
    for i, scale in enumerate(scales):
        torch.testing.assert_close(output(together, together)[i], output(scale, scale)[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(output(together, 3.0)[i], output(scale, 3.0)[i], rtol=1e-5, atol=1e-6)


def test_scales_are_uniform_on_their_range_and_follow_their_generator():
    scales = draw_scales(2.0, 6.0, 20_000, generator=torch.Generator().manual_seed(0))
    assert scales.min() >= 2 and scales.max() < 6
    assert abs(scales.mean().item() - 4) < 5 * (4 / 12**0.5) / 20_000**0.5  # five standard errors
    assert torch.equal(scales, draw_scales(2.0, 6.0, 20_000, generator=torch.Generator().manual_seed(0)))


def test_the_scale_of_a_window():
    assert Guidance("fixed", 3.0).scale_in(torch.tensor([0, 1])) == 3.0
    assert Guidance("fixed", (9, 7, 5)).scale_in(torch.tensor([2, 0])).tolist() == [5.0, 9.0]


@pytest.mark.parametrize(("which", "channels", "bound"), [(0, 256, 3e-5), (1, 256, 2e-4), (0, 64, 2e-3), (1, 64, 4e-2)])
def test_no_timestep_uses_the_directions_of_further_inputs(which, channels, bound):
    plain = Features(channels).plain(torch.linspace(0, 1000, 2001)).double()
    toward = direction(channels, which)
    if channels == 256:  # of all of Open-Sora's networks
        assert abs(toward @ direction(channels, 1 - which)) < 1e-12
    cosine = (plain @ toward) / plain.norm(dim=1) / toward.norm()
    assert cosine.abs().max() < bound


def test_scale_one_is_the_network_as_it_was_and_others_are_not():
    network = tiny_network()
    x, args = batch(network)
    t, before = torch.tensor([900.0, 100.0]), set(network.state_dict())
    plain = network(x, t, **args)
    with told(network, torch.ones(2)):
        assert torch.equal(network(x, t, **args), plain)
    with told(network, torch.tensor([1.0, 5.0])):
        other = network(x, t, **args)
    assert torch.equal(other[0], plain[0]) and not torch.allclose(other[1], plain[1])
    assert torch.equal(network(x, t, **args), plain) and set(network.state_dict()) == before


def test_the_scale_is_forgotten_after_an_error():
    network = tiny_network()
    x, args = batch(network)
    t = torch.tensor([900.0, 100.0])
    plain = network(x, t, **args)
    with pytest.raises(RuntimeError, match="stop"), told(network, torch.full((2,), 5.0)):
        raise RuntimeError("stop")
    assert torch.equal(network(x, t, **args), plain)


def test_a_copy_is_not_told_the_scale_of_its_original():
    network = tiny_network()
    x, args = batch(network)
    t = torch.tensor([900.0, 100.0])
    plain = network(x, t, **args)
    with told(network, torch.full((2,), 5.0)):
        copy, answer = deepcopy(network), network(x, t, **args)
        assert torch.equal(copy(x, t, **args), plain)
    assert torch.equal(copy(x, t, **args), plain)
    with told(copy, torch.full((2,), 5.0)):
        assert torch.equal(copy(x, t, **args), answer) and torch.equal(network(x, t, **args), plain)
    assert set(copy.state_dict()) == set(tiny_network().state_dict())


def test_scales_told_inside_one_another():
    network = tiny_network()
    x, args = batch(network)
    t = torch.tensor([900.0, 100.0])
    with told(network, torch.full((2,), 5.0)):
        five = network(x, t, **args)
        with told(network, torch.full((2,), 3.0)):
            assert not torch.allclose(network(x, t, **args), five)
        assert torch.equal(network(x, t, **args), five)
    assert len(network.t_embedder.mlp._forward_pre_hooks) == 1


def test_a_network_without_timestep_features_is_refused():
    network = Reference13().train()
    x, args = batch(network)
    with pytest.raises(ValueError, match='Reference13 cannot be told a guidance scale.*mode="fixed"'):
        PeRFlow(guidance=dict(mode="range", scale=(1, 9))).training_losses(network, x, args)


def test_half_precision_keeps_scales_apart():
    network = tiny_network().to(torch.bfloat16)
    x, args = batch(network)
    seen = []
    network.t_embedder.mlp.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for scale in (3.0, 3.25):
        with told(network, torch.full((2,), scale)):
            network(x, torch.tensor([900.0, 100.0]), **args)
    toward = direction(256)
    difference = (seen[1].double() - seen[0].double()) @ toward / toward.square().sum() * UNIT
    # 32 features below 1 that are rounded to 1/256 each, twice: 0.25 within a few roundings of UNIT / 256 / sqrt(12).
    assert ((difference - 0.25).abs() < 0.05).all()


def test_the_network_learns_what_the_scale_means():
    network = tiny_network().train()
    x, args = batch(network)
    PeRFlow(guidance=dict(mode="range", scale=(1, 9))).training_losses(network, x, args)["loss"].mean().backward()
    gradient = network.t_embedder.mlp[0].weight.grad @ direction(256).float()
    assert gradient.abs().max() > 0


# --- opensora-perflow embed ---


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A checkout with nothing but registries and one text encoder."""
    root = tmp_path / "Open-Sora"
    (root / "opensora").mkdir(parents=True)
    (root / "opensora" / "__init__.py").touch()
    (root / "opensora" / "registry.py").write_text(
        "import torch\n"
        "MODELS = SCHEDULERS = DATASETS = None\n"
        "class Encoder:\n"
        "    def tokenize_fn(self, texts): return dict(texts=texts)\n"
        "    def encode(self, texts):\n"
        "        return dict(y=torch.full((1, 1, 4, 3), float(len(texts[0]))), mask=torch.tensor([[1, 1, 0, 0]]))\n"
        "def build_module(config, registry, device):\n"
        "    assert config == dict(type='t5', model_max_length=4), config\n"
        "    return Encoder()\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "opensora"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("opensora_perflow.portable.activate", lambda: None)
    yield root
    for name in [name for name in sys.modules if name.split(".")[0] == "opensora"]:
        del sys.modules[name]


def test_embed_writes_what_training_reads(host, tmp_path, capsys):
    config, out = tmp_path / "train.py", tmp_path / "negative.safetensors"
    config.write_text("text_encoder = dict(type='t5', model_max_length=4, shardformer=True)\n")
    assert cli.main(["embed", str(config), "blurry", "--out", str(out), "--open-sora", str(host)]) == 0
    found = read_negative(out)
    assert found["y"].unique().tolist() == [6.0] and found["mask"].tolist() == [[1, 1, 0, 0]]
    assert f"written to {out}" in capsys.readouterr().out


def test_mistakes_of_embed_are_one_line(host, tmp_path, capsys):
    config = tmp_path / "train.py"
    config.write_text("model = dict(type='STDiT3-XL/2')\n")
    for options, message in (
        (["--out", "n.pt"], "--out must end in .safetensors, got 'n.pt'"),
        (["--open-sora", str(tmp_path)], "must be the root of an Open-Sora 1.x checkout"),
        (["--open-sora", str(host), "--out", str(tmp_path / "n.safetensors")], "has no text_encoder"),
    ):
        assert cli.main(["embed", str(config), "blurry", *options]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("opensora-perflow: ") and message in error
    assert not (tmp_path / "n.safetensors").exists()


def test_embed_says_which_package_open_sora_lacks(host, tmp_path, monkeypatch):
    (host / "opensora" / "registry.py").write_text("raise ImportError('no colossalai')\n")
    (tmp_path / "train.py").touch()  # a config that is missing is said first
    with pytest.raises(ValueError, match=r"cannot be imported \(no colossalai\); install what is missing"):
        embed(tmp_path / "train.py", "blurry", tmp_path / "n.safetensors", host)
