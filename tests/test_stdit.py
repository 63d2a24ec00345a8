"""The host adapter: what reaches the network, in which order, with which sign."""

import pytest
import torch
from networks import PROMPTS, CountCalls, Reference13, batch, sizes, text_encoder, tiny_network

from opensora_perflow.hosts.v1 import conditions, stdit
from opensora_perflow.hosts.v1.network import Interface
from opensora_perflow.method.guidance import classifier_free, text_and_image

T = torch.tensor([0.9, 0.4], dtype=torch.float64)


def field(network, condition, **settings):
    return stdit.velocity_field(network, network, condition, num_timesteps=1000, **settings)


def test_velocity_is_minus_the_first_half_of_the_output_at_a_thousandfold_time():
    network = tiny_network()
    x, args = batch(network)
    v = field(network, conditions.training_condition(Interface.of(network), args))(x, T)
    torch.testing.assert_close(v, -network(x, (T * 1000).float(), **args)[:, :4], rtol=0, atol=0)


def test_guidance_doubles_the_batch_and_truncates_the_null_text():
    network = tiny_network()
    count = CountCalls(network)
    x, args = batch(network)
    condition = conditions.training_condition(Interface.of(network), args)
    guided = field(network, condition, text_scale=3.0)(x, T)
    assert (count.calls, count.samples) == (1, 4)
    parts = []
    for text in (args["y"], condition.null):  # the unguided branch is cut to its prompt's own length
        parts.append(-network(x, (T * 1000).float(), **{**args, "y": text})[:, :4])
    # One batch of 4 or two of 2: float32 sums in another order.
    torch.testing.assert_close(guided, classifier_free(*parts, 3.0), rtol=1e-4, atol=1e-5)


def test_a_guided_text_is_concatenated_once_for_all_steps():
    network = Reference13().eval()
    x, args = batch(network)
    condition = conditions.training_condition(Interface.of(network), args)
    for scale in (3.0, 3.0, 1.0):
        field(network, condition, text_scale=scale)(x, T)
    first, second, unguided = (seen["y"] for seen in network.seen[-3:])
    assert first is second and len(unguided) == 2
    field(network, condition, rows=torch.tensor([1]), text_scale=3.0)(x[1:], T[1:])
    assert torch.equal(network.seen[-1]["y"], first[1::2])


def test_scale_one_needs_no_second_branch():
    network = tiny_network()
    count = CountCalls(network)
    x, args = batch(network)
    field(network, conditions.training_condition(Interface.of(network), args), text_scale=1.0)(x, T)
    assert count.samples == 2


def test_frame_masks_are_tiled_and_sizes_are_not():
    network = Reference13().eval()
    x, args = batch(network)
    mask = torch.tensor([[True] * 5, [False] + [True] * 4])
    field(network, conditions.training_condition(Interface.of(network), args), text_scale=3.0, frame_mask=mask)(x, T)
    seen = network.seen[-1]
    assert torch.equal(seen["x_mask"], mask.repeat(2, 1))
    assert len(seen["height"]) == len(seen["mask"]) == 2 and len(seen["y"]) == len(seen["timestep"]) == 4
    assert seen["mask_index"] is None and seen["cond"] is None  # text-to-video: as it is sampled
    assert seen["text_uncond_prob"] == 0.0


def test_dropped_prompts_become_the_networks_own_null():
    network = tiny_network()
    _, args = batch(network)
    text = conditions.training_condition(Interface.of(network), args, drop=torch.tensor([True, False])).text
    assert torch.equal(text[0, 0], network.y_embedder.y_embedding) and torch.equal(text[1], args["y"][1])


def test_arguments_that_a_network_does_not_take_are_left_out():
    class Strict(Reference13):
        def forward(self, x, timestep, y, mask=None):
            return super().forward(x, timestep, y, mask)

    network = Strict().eval()
    x, args = batch(network)
    v = field(network, conditions.training_condition(Interface.of(network), args))(x, T)
    assert v.shape == x.shape
    with pytest.raises(ValueError, match="Strict takes no frame mask"):
        field(
            network, conditions.training_condition(Interface.of(network), args), frame_mask=torch.ones(2, 5, dtype=torch.bool)
        )
    reference = conditions.Reference.of(x, [0])
    condition = conditions.with_reference(conditions.training_condition(Interface.of(network), args), reference, (False, False))
    with pytest.raises(ValueError, match="Strict takes no reference frames"):
        field(network, condition)


def test_a_forward_that_belongs_to_the_instance_is_read():
    network = tiny_network()
    assert "fps" in Interface.of(network).parameters
    network.forward = lambda x, timestep, guidance: x
    assert list(Interface.of(network).parameters) == ["x", "timestep", "guidance"]


def test_networks_without_a_variance_half_are_taken_whole():
    class Plain(Reference13):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)[:, :4]

        forward.__signature__ = __import__("inspect").signature(Reference13.forward)

    network = Plain().eval()
    x, args = batch(network)
    assert field(network, conditions.training_condition(Interface.of(network), args))(x, T).shape == x.shape


def test_guidance_without_null_text_is_refused():
    network = tiny_network()
    x, args = batch(network)
    network.config = type("Config", (), {"skip_y_embedder": True})()
    condition = conditions.training_condition(Interface.of(network), args)
    with pytest.raises(ValueError, match="guidance needs the network's null text"):
        field(network, condition, text_scale=3.0)
    with pytest.raises(ValueError, match="prompts cannot be dropped"):
        conditions.training_condition(Interface.of(network), args, drop=torch.tensor([True, False]))
    with pytest.raises(ValueError, match="reference frames need the network's null text"):
        conditions.with_reference(condition, conditions.Reference.of(x, [0]), (False, False))


def test_text_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"text embeddings must be \[B, 1, 10, 32\] for this network, got \[2, 1, 7, 32\]"):
        Interface.of(tiny_network()).null_text(torch.zeros(2, 1, 7, 32))


def test_missing_text_is_refused():
    with pytest.raises(ValueError, match="model_args needs the text embeddings 'y'"):
        conditions.training_condition(Interface.of(tiny_network()), sizes(2))


def test_text_dropout_is_the_networks_own_and_off_outside_training():
    network = tiny_network(class_dropout_prob=0.3)
    assert Interface.of(network).text_dropout == 0.0 and Interface.of(network.train()).text_dropout == pytest.approx(0.3)
    seen = []
    call = stdit.without_text_dropout(
        lambda *inputs, **named: seen.append((network.y_embedder.uncond_prob, inputs, named)), Interface.of(network)
    )
    call(1, mask=2)
    assert seen == [(0.0, (1,), {"mask": 2})] and network.y_embedder.uncond_prob == pytest.approx(0.3)
    with pytest.raises(ZeroDivisionError):
        stdit.without_text_dropout(lambda: 1 / 0, Interface.of(network))()
    assert network.y_embedder.uncond_prob == pytest.approx(0.3)
    assert stdit.without_text_dropout(lambda **named: named, Interface.of(Reference13()))() == {"text_uncond_prob": 0.0}


# --- v1.3's reference frames ---


def test_a_network_that_is_fed_projected_text_drops_none():
    network = tiny_network().train()
    network.y_embedder.uncond_prob = 1.0
    assert Interface.of(network).text_dropout == 1.0
    network.config = type("Config", (), {"skip_y_embedder": True})()
    assert Interface.of(network).text_dropout == 0.0


def test_reference_keeps_only_its_frames():
    latents = torch.randn(2, 4, 5, 2, 2)
    reference = conditions.Reference.of(latents, [0, 3])
    assert torch.equal(reference.latents[:, :, [0, 3]], latents[:, :, [0, 3]])
    assert reference.latents[:, :, [1, 2, 4]].abs().sum() == 0
    assert reference.mask[:, :, [0, 3]].min() == 1 and reference.mask[:, :, [1, 2, 4]].max() == 0


@pytest.mark.parametrize("frames", [[5], [-1]])
def test_reference_frames_outside_the_clip_are_refused(frames):
    with pytest.raises(ValueError, match=r"mask_index must hold latent frame indices in 0\.\.4"):
        conditions.Reference.of(torch.zeros(1, 4, 5, 2, 2), frames)


def test_three_branches_in_upstreams_order():
    network = Reference13().eval()
    x, args = batch(network)
    reference = conditions.Reference.of(torch.randn_like(x), [0])
    condition = conditions.with_reference(conditions.training_condition(Interface.of(network), args), reference, (False, False))
    v = field(network, condition, text_scale=3.0, image_scale=2.0)(x, T)
    seen = network.seen[-1]
    null = Interface.of(network).null_text(args["y"])
    assert torch.equal(seen["y"], torch.cat([args["y"], null, null]))
    assert torch.equal(seen["cond"], torch.cat([reference.latents, reference.latents, torch.zeros_like(x)]))
    assert torch.equal(seen["cond_mask"], reference.mask.repeat(3, 1, 1, 1, 1))
    assert torch.equal(seen["y_null"], null.repeat(3, 1, 1, 1)) and seen["mask_index"] == [0]
    full, image, none = (-o for o in network(**{k: v for k, v in seen.items() if v is not None})[:, :4].chunk(3))
    torch.testing.assert_close(v, text_and_image(full, image, none, 3.0, 2.0))


def test_dropping_the_condition_is_one_draw_for_the_batch():
    generator = torch.Generator().manual_seed(0)
    assert conditions.draw_reference_drop(None, generator) == (False, False)
    for name, drops in dict(null=(True, True), cond=(True, False), text=(False, True), keep=(False, False)).items():
        assert conditions.draw_reference_drop({name: 1.0, "keep": 0.0} | {name: 1.0}, generator) == drops
    network = Reference13()
    x, args = batch(network)
    plain = conditions.training_condition(Interface.of(network), args)
    dropped = conditions.with_reference(plain, conditions.Reference.of(x, [0]), (True, True))
    assert torch.equal(dropped.text, plain.null) and dropped.reference.latents.abs().sum() == 0
    assert dropped.reference.mask[:, :, 0].min() == 1  # upstream never hides which frames were conditioned


def test_reference_frame_weights_keep_their_total():
    reference = conditions.Reference.of(torch.zeros(2, 4, 5, 2, 2), [0, 1])
    for weight in (0.0, 0.5, 1.0):
        weights = conditions.reference_frame_weights(reference, weight)
        assert weights.sum(dim=1).tolist() == pytest.approx([5.0, 5.0]) and weights[0, 0] == weight
    everywhere = conditions.Reference.of(torch.zeros(1, 4, 2, 1, 1), [0, 1])
    assert conditions.reference_frame_weights(everywhere, 0.5).tolist() == [[0.5, 0.5]]


def test_put_back_reference_noises_only_its_frames():
    x, clean = torch.randn(2, 1, 4, 5, 2, 2)
    reference = conditions.Reference.of(clean, [4])
    out = conditions.put_back_reference(x, torch.zeros(1, dtype=torch.float64), reference)
    assert torch.equal(out[:, :, :4], x[:, :, :4]) and torch.equal(out[:, :, 4], clean[:, :, 4])


# --- prompts at sampling time ---


def condition_for(network, **settings):
    defaults = dict(negative_prompts=None, additional_args=sizes(2), reference=None, needs_null=True)
    return conditions.sampling_condition(network, text_encoder(network), PROMPTS, **{**defaults, **settings})


def test_negative_prompts_bring_their_own_mask():
    network = Reference13().eval()
    condition = condition_for(network, negative_prompts=["blurry", "a very long and ugly negative prompt"])
    field(network, condition, text_scale=3.0)(torch.randn(2, 4, 5, 2, 2), T)
    seen = network.seen[-1]
    assert len(seen["mask"]) == 4 and seen["mask"].sum(dim=1).tolist()[2:] != seen["mask"].sum(dim=1).tolist()[:2]
    assert torch.equal(condition.strict_null[0, 0], network.y_embedder.y_embedding)


def test_without_an_unguided_branch_no_null_is_made():
    assert condition_for(tiny_network(), needs_null=False).null is None
