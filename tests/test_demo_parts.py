"""The demo's clips, codec, text encoder and teacher."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import train_teacher
from safetensors.torch import load_file

from opensora_perflow.worlds import clips, codec, model, text, videos
from opensora_perflow.worlds.codec import TinyVAE
from opensora_perflow.worlds.model import TinySTDiT
from opensora_perflow.worlds.text import TinyTextEncoder

# ---------------------------------------------------------------- clips


def test_clip_is_decided_by_its_seed() -> None:
    frames, caption = clips.make_clip(7)
    again, caption_again = clips.make_clip(7)
    assert frames.shape == (17, 64, 64, 3) and frames.dtype == np.uint8
    assert caption == caption_again and np.array_equal(frames, again)
    assert not np.array_equal(frames, clips.make_clip(8)[0])


@pytest.mark.parametrize("content", clips.contents(), ids=lambda content: content.caption)
def test_clip_shows_what_its_caption_says(content: clips.Content) -> None:
    frames, caption = clips.make_clip(1, content)
    assert caption == content.caption
    assert clips.recognise(frames) == content


def test_a_shape_is_drawn_at_its_centers() -> None:
    centers = np.array([[20.0, 40.0], [44.0, 24.0]])  # (x, y)
    frames = clips.draw_shape("red", "circle", centers, 6.0)
    bright = np.abs(frames.astype(float) - np.array(clips.BACKGROUND)).sum(axis=-1) > 100
    for shown, center in zip(bright, centers):
        y, x = np.nonzero(shown)
        np.testing.assert_allclose([x.mean() + 0.5, y.mean() + 0.5], center, atol=1e-9)  # symmetric about the center
        assert abs(shown.sum() - np.pi * 36) < 10  # the outline's anti-aliased pixels
    assert frames[0, 40, 20].tolist() == list(clips.COLORS["red"])


def test_shape_stays_inside_the_frame() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        frames, _ = clips.make_clip(rng, height=20, width=80)
        border = np.concatenate([frames[:, [0, -1]].reshape(-1, 3), frames[:, :, [0, -1]].reshape(-1, 3)])
        assert (border == clips.BACKGROUND).all()


def test_nothing_is_recognised_in_an_empty_clip() -> None:
    empty = np.full((17, 64, 64, 3), clips.BACKGROUND, dtype=np.uint8)
    assert clips.recognise(empty) == clips.Content("none", "none", "none")
    still = np.repeat(clips.make_clip(0)[0][:1], 17, axis=0)
    assert clips.recognise(still).direction == "none" and clips.recognise(still).color != "none"


@pytest.mark.parametrize("sizes", [{"num_frames": 0}, {"height": 8}, {"width": 15}])
def test_too_small_a_clip_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="the demo uses 17, 64, 64"):
        clips.make_clip(0, **sizes)


def test_unknown_content_is_refused() -> None:
    with pytest.raises(ValueError, match="shapes .'circle', 'square', 'triangle'"):
        clips.make_clip(0, clips.Content("red", "hexagon", "left"))


def test_written_clips_are_read_back(tmp_path: Path) -> None:
    table = clips.write_clips(tmp_path / "videos", 6, seed=3, fps=12)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and all(Path(row["path"]).is_file() for row in rows)
    assert {"path", "text", "num_frames", "height", "width", "fps"} <= rows[0].keys()
    assert (rows[0]["num_frames"], rows[0]["height"], rows[0]["width"], rows[0]["fps"]) == ("17", "64", "64", "12")
    for source in (table, table.parent):
        found = clips.read_clips(source)
        assert len(found) == 6 and found.frames.shape == (6, 17, 64, 64, 3) and found.frames.dtype == np.uint8
        assert sorted(found.captions) == sorted(row["text"] for row in rows)
        assert found.fps == [12.0] * 6
        assert [clips.recognise(one).caption for one in found.frames] == found.captions


def test_written_clips_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first, second = (clips.read_clips(clips.write_clips(tmp_path / name, 3, seed=5)) for name in "ab")
    assert first.captions == second.captions
    # The encoder is not the same to the last bit on a busy machine: .016 levels apart in the mean, of 255, in 14 runs.
    assert np.abs(first.frames.astype(int) - second.frames).mean() < 0.1
    assert clips.read_clips(clips.write_clips(tmp_path / "c", 3, seed=6)).captions != first.captions


def test_captions_follow_a_moved_folder(tmp_path: Path) -> None:
    table = clips.write_clips(tmp_path / "here", 2)
    expected = clips.read_clips(table).captions
    (tmp_path / "here").rename(tmp_path / "there")
    assert sorted(clips.read_clips(tmp_path / "there").captions) == sorted(expected)


def test_other_sizes_lengths_and_names_are_read(tmp_path: Path) -> None:
    frames, _ = clips.make_clip(0, clips.Content("red", "circle", "right"), num_frames=41, height=96, width=128)
    clips.write_video(tmp_path / "deeper" / "A-red_circle moving.right 0012.mp4", frames, fps=24)
    found = clips.read_clips(tmp_path)
    assert found.captions == ["a red circle moving right"] and found.frames.shape == (1, 17, 64, 64, 3)
    assert clips.recognise(found.frames[0])[:2] == ("red", "circle")
    # evenly taken: first and last of the kept frames are the first and last of the file
    whole = clips.read_clips(tmp_path, num_frames=41).frames[0]
    assert np.array_equal(found.frames[0][[0, -1]], whole[[0, -1]])


def test_a_long_video_is_thinned_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.arange(100, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3) * 2
    clips.write_video(tmp_path / "ramp.mp4", ramp)
    monkeypatch.setattr(videos, "_MAX_HELD_FRAMES", 40)
    levels = clips.read_clips(tmp_path, num_frames=5, height=16, width=16).frames.mean(axis=(2, 3, 4))[0]
    steps = np.diff(levels)
    assert levels[0] < 6 and levels[-1] > 150 and steps.min() > 0.6 * steps.max()


def test_a_corrupt_clip_is_named_counted_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clips.write_clips(tmp_path, 2)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        found = clips.read_clips(tmp_path)
    assert len(found) == 2
    assert "broken.mp4" in caplog.text and "empty.mp4" in caplog.text and "skipped 2 of 4 videos" in caplog.text


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder nor a CSV"):
        clips.read_clips(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no video in .*are accepted"):
        clips.read_clips(tmp_path)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(ValueError, match="none of the 1 videos"):
        clips.read_clips(tmp_path)
    (tmp_path / "table.csv").write_text("name\nbroken.mp4\n")
    with pytest.raises(ValueError, match="names no videos"):
        clips.read_clips(tmp_path / "table.csv")
    with pytest.raises(ValueError, match="num_clips must be at least 1"):
        clips.write_clips(tmp_path, 0)


def test_write_video_leaves_no_part_of_a_failed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, _ = clips.make_clip(0)
    assert clips.write_video(tmp_path / "good.mp4", frames) == tmp_path / "good.mp4"
    before = (tmp_path / "good.mp4").read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(videos.np, "ascontiguousarray", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        clips.write_video(tmp_path / "good.mp4", frames)
    assert (tmp_path / "good.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["good.mp4"]


@pytest.mark.parametrize(
    ("frames", "fps", "match"),
    [
        (np.zeros((2, 16, 16, 3), np.float32), 8, "frames must be uint8"),
        (np.zeros((2, 3, 16, 16), np.uint8), 8, "frames must be uint8"),
        (np.zeros((2, 15, 16, 3), np.uint8), 8, "must be even"),
        (np.zeros((2, 16, 16, 3), np.uint8), 0, "fps > 0"),
    ],
)
def test_write_video_refuses(tmp_path: Path, frames: np.ndarray, fps: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        clips.write_video(tmp_path / "video.mp4", frames, fps=fps)


def test_frames_and_tensors_convert_both_ways() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    video = clips.frames_to_tensor(frames)
    assert video.shape == (2, 3, 3, 4, 5) and video.min() >= -1 and video.max() <= 1
    assert np.array_equal(clips.tensor_to_frames(video), frames)
    assert np.array_equal(clips.tensor_to_frames(video * 1000), np.where(frames > 127, 255, 0))


# ---------------------------------------------------------------- codec


@pytest.mark.parametrize(("num_frames", "num_latent"), [(1, 1), (4, 1), (5, 2), (16, 4), (17, 5), (18, 6), (34, 10), (51, 15)])
def test_latent_sizes(num_frames: int, num_latent: int) -> None:
    vae = TinyVAE(pretrained=False)
    video = torch.randn(2, 3, num_frames, 16, 40)
    with torch.no_grad():
        latents = vae.encode(video)
        assert list(latents.shape) == [2, 4, num_latent, 2, 5] == [2, 4, *vae.get_latent_size([num_frames, 16, 40])]
        assert vae.decode(latents, num_frames=num_frames).shape == video.shape
    assert vae.get_latent_size([None, 64, None]) == [None, 8, None]
    assert (vae.out_channels, vae.micro_frame_size, vae.temporal_overlap) == (4, 17, False)


def test_latents_alone_give_the_usual_length() -> None:
    vae = TinyVAE(pretrained=False)
    with torch.no_grad():
        assert [vae.decode(torch.zeros(1, 4, n, 1, 1)).shape[2] for n in (1, 2, 5, 6, 10)] == [1, 5, 17, 18, 34]


def test_pieces_of_17_frames_are_independent() -> None:
    vae = TinyVAE(pretrained=False)
    video = torch.randn(1, 3, 34, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(video)[:, :, 5:], vae.encode(video[:, :, 17:]))


def test_the_hosts_size_and_an_unbatched_decode() -> None:
    vae = TinyVAE()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 17, 192, 192))
        assert latents.shape == (1, 4, 5, 24, 24)
        video = vae.decode(latents[0], num_frames=17)  # v1.3's inference.py, which then calls squeeze(0)
    assert video.shape == (3, 17, 192, 192)
    # a ragged edge is left out like by the host's strided convolutions
    assert vae.get_latent_size([17, 100, 71]) == [5, 12, 8]
    assert vae.encode(torch.zeros(1, 3, 1, 100, 71)).shape[-2:] == (12, 8)


def test_shipped_codec_keeps_pictures_and_normalises_latents() -> None:
    vae = TinyVAE()
    rng = np.random.default_rng(99)  # clips it has not seen
    frames, captions = zip(*(clips.make_clip(rng) for _ in range(24)))
    video = clips.frames_to_tensor(np.stack(frames))
    with torch.no_grad():
        latents = vae.encode(video)
        decoded = vae.decode(latents, num_frames=17)
    psnr = -10 * torch.log10((decoded - video).square().mean() / 4)
    assert psnr > 28
    assert latents.mean().abs() < 0.15 and 0.8 < latents.std() < 1.2
    assert [clips.recognise(one).caption for one in clips.tensor_to_frames(decoded)] == list(captions)


def test_codec_follows_its_dtype_and_the_callers() -> None:
    vae = TinyVAE().to(torch.bfloat16)
    assert vae.dtype == torch.bfloat16 and vae.device == torch.device("cpu")
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 1, 16, 16))
        assert latents.dtype == torch.float32
        assert vae.decode(latents.bfloat16()).dtype == torch.bfloat16


def test_codec_errors() -> None:
    vae = TinyVAE(pretrained=False)
    for shape in ([3, 17, 64, 64], [1, 4, 17, 64, 64], [1, 3, 0, 64, 64], [1, 3, 1, 64, 7]):
        with pytest.raises(ValueError, match="encode takes a video"):
            vae.encode(torch.zeros(shape))
    for shape in ([1, 3, 5, 8, 8], [4, 8, 8], [1, 4, 0, 8, 8]):
        with pytest.raises(ValueError, match="decode takes latents"):
            vae.decode(torch.zeros(shape))
    with pytest.raises(ValueError, match="num_frames=12 does not belong to 5 latent frames"):
        vae.decode(torch.zeros(1, 4, 5, 2, 2), num_frames=12)


def test_codec_weights_missing_or_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(codec, "WEIGHTS", tmp_path / "codec.safetensors")
    with caplog.at_level(logging.WARNING):
        TinyVAE()
    assert "weights are missing" in caplog.text
    train_teacher.save_weights(torch.nn.Linear(2, 2), tmp_path / "codec.safetensors")
    with pytest.raises(ValueError, match="does not fit TinyVAE"):
        TinyVAE()


# ---------------------------------------------------------------- text


def test_words_own_fixed_vectors() -> None:
    torch.manual_seed(0)
    first = TinyTextEncoder().encode(["a red circle", "a Red, CIRCLE!", "circle"])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = TinyTextEncoder().encode(["a red circle"])
    assert torch.equal(torch.get_rng_state(), before)
    assert first["y"].shape == (3, 1, 10, 32) and first["y"].dtype == torch.float32
    assert torch.equal(first["y"][0], second["y"][0]) and torch.equal(first["y"][0], first["y"][1])
    assert torch.equal(first["y"][2, 0, 0], first["y"][0, 0, 2])
    assert first["mask"].tolist() == [[1] * 4 + [0] * 6, [1] * 4 + [0] * 6, [1] * 2 + [0] * 8]
    assert first["mask"].dtype == torch.int64
    assert first["y"][0, 0, 4:].abs().sum() == 0
    # golden value, TinyTextEncoder().encode(["red"])["y"][0, 0, 0, :3]: the shipped teacher knows these vectors
    torch.testing.assert_close(first["y"][0, 0, 1, :3], torch.tensor(GOLDEN_RED), rtol=0, atol=1e-6)


def test_unknown_words_share_buckets_and_long_texts_keep_their_end() -> None:
    encoder = TinyTextEncoder(model_max_length=4)
    tokens = encoder.tokenize_fn(["zebra crossing", "", "a b c d e f"])
    assert tokens["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert (tokens["input_ids"][:, :] == text.END).any(dim=1).all() and int(tokens["input_ids"][2, 3]) == text.END
    assert int(tokens["input_ids"][0, 0]) == text._word_id("zebra") >= 2 + len(text.VOCABULARY)
    assert len(set(text.VOCABULARY)) == len(text.VOCABULARY)


def test_both_call_styles_of_the_host_agree() -> None:
    encoder = TinyTextEncoder()
    texts = ["a red circle moving right", "a dog"]
    plain = encoder.encode(texts)
    tokens = encoder.tokenize_fn(texts)
    for other in (
        encoder.encode(**tokens),
        encoder.encode(tokens["input_ids"], attention_mask=tokens["attention_mask"]),
        encoder.encode(input_ids=tokens["input_ids"]),
    ):
        assert torch.equal(other["y"], plain["y"]) and torch.equal(other["mask"], plain["mask"])
    single = {name: value.squeeze(0) for name, value in encoder.tokenize_fn(texts[0]).items()}  # v1.3's dataset
    assert torch.equal(single["input_ids"], tokens["input_ids"][0])


def test_null_text_is_the_models() -> None:
    encoder, network = TinyTextEncoder(), TinySTDiT(hidden_size=16, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="text_encoder.y_embedder = model.y_embedder"):
        encoder.null(2)
    encoder.y_embedder = network.y_embedder
    null = encoder.null(3)
    assert null.shape == (3, 1, 10, 32) and torch.equal(null[1, 0], network.y_embedder.y_embedding)


def test_text_errors() -> None:
    encoder = TinyTextEncoder()
    with pytest.raises(ValueError, match="exactly one"):
        encoder.encode()
    with pytest.raises(ValueError, match="exactly one"):
        encoder.encode(["a"], input_ids=torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match="leave it out"):
        encoder.encode(["a"], attention_mask=torch.ones(1, 10))
    with pytest.raises(ValueError, match="tokenize_fn"):
        encoder.encode(torch.full((1, 10), 10**6))
    with pytest.raises(ValueError, match="model_max_length >= 2"):
        TinyTextEncoder(model_max_length=1)


# ---------------------------------------------------------------- model


@pytest.fixture
def network() -> TinySTDiT:
    """A small network in which every weight matters."""
    torch.manual_seed(0)
    net = TinySTDiT(hidden_size=16, depth=2, num_heads=2).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name != "rope.freqs":
                parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def network_inputs(batch: int = 2, frames: int = 3, rows: int = 4, columns: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(batch, 4, frames, rows, columns, generator=generator),
        "timestep": torch.linspace(900, 100, batch),
        "y": torch.randn(batch, 1, 10, 32, generator=generator),
        "mask": torch.tensor([[1] * 6 + [0] * 4, [1] * 3 + [0] * 7])[:batch],
        "fps": torch.full((batch,), 8.0),
        "height": torch.full((batch,), 8.0 * rows),
        "width": torch.full((batch,), 8.0 * columns),
    }


def test_state_dict_keys_are_stdit3s() -> None:
    keys = set(TinySTDiT(hidden_size=16, depth=1, num_heads=2).state_dict())
    block = {f"{layer}.{kind}" for layer in BLOCK_LAYERS for kind in ("weight", "bias")}
    block |= {"attn.q_norm.weight", "attn.k_norm.weight", "scale_shift_table"}
    expected = {f"{kind}_blocks.0.{key}" for kind in ("spatial", "temporal") for key in block}
    expected |= {f"{layer}.{kind}" for layer in OTHER_LAYERS for kind in ("weight", "bias")}
    expected |= {"rope.freqs", "y_embedder.y_embedding", "final_layer.scale_shift_table"}
    assert keys == expected


@torch.no_grad()
def test_output_has_the_hosts_shape_for_any_size(network: TinySTDiT) -> None:
    for frames, rows, columns in ((1, 4, 4), (5, 8, 8), (3, 7, 5)):
        inputs = network_inputs(2, frames, rows, columns)
        out = network(**inputs, num_frames=torch.ones(2), ar=torch.ones(2))
        assert out.shape == (2, 8, frames, rows, columns) and out.dtype == torch.float32
    assert network.bfloat16()(**inputs).dtype == torch.float32


@torch.no_grad()
def test_guided_batch_tiles_the_prompts_mask(network: TinySTDiT) -> None:
    inputs = network_inputs()
    null = network.y_embedder.y_embedding[None, None].repeat(2, 1, 1, 1)
    guided = network(
        **{**inputs, "x": inputs["x"].repeat(2, 1, 1, 1, 1), "timestep": inputs["timestep"].repeat(2)}
        | {"y": torch.cat([inputs["y"], null])}
    )
    torch.testing.assert_close(guided[:2], network(**inputs), rtol=1e-5, atol=1e-5)
    alone = network(**{**inputs, "y": null})
    torch.testing.assert_close(guided[2:], alone, rtol=1e-5, atol=1e-5)
    # the null text is cut to the prompt's length, so it differs from the whole null text
    assert (alone - network(**{**inputs, "y": null, "mask": None})).abs().max() > 1e-4


@torch.no_grad()
def test_masked_words_have_no_effect(network: TinySTDiT) -> None:
    inputs = network_inputs()
    changed = inputs["y"].clone()
    changed[0, 0, 6:] += 1.0
    torch.testing.assert_close(network(**inputs), network(**{**inputs, "y": changed}))
    changed[0, 0, 5] += 1.0
    assert (network(**inputs) - network(**{**inputs, "y": changed}))[0].abs().max() > 1e-4


@torch.no_grad()
def test_given_frames_are_modulated_at_time_zero(network: TinySTDiT) -> None:
    inputs = network_inputs()
    none_given = network(**inputs, x_mask=torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(none_given, network(**inputs))
    first_given = torch.tensor([[False, True, True]]).repeat(2, 1)
    assert (network(**inputs, x_mask=first_given) - none_given).abs().max() > 1e-3
    # at timestep 0 both modulations are one, so the other frames cannot tell that a frame is given
    at_zero = {**inputs, "timestep": torch.zeros(2)}
    torch.testing.assert_close(network(**at_zero, x_mask=first_given)[:, :, 1:], network(**at_zero)[:, :, 1:])


def test_text_is_dropped_per_sample_in_train_mode_alone(network: TinySTDiT) -> None:
    inputs = network_inputs()
    null = network.y_embedder.y_embedding[None, None].repeat(2, 1, 1, 1)
    network.y_embedder.uncond_prob = 1.0
    with torch.no_grad():
        with_text, without = network(**inputs), network(**{**inputs, "y": null})
        assert (with_text - without).abs().max() > 1e-4
        torch.testing.assert_close(network.train()(**inputs), without)
        network.y_embedder.uncond_prob = 0.5
        torch.manual_seed(3)
        dropped = torch.rand(2) < 0.5
        torch.manual_seed(3)
        mixed = network(**inputs)
    expected = torch.where(dropped[:, None, None, None, None], without, with_text)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    network.y_embedder.uncond_prob = 0.0
    network(**inputs).square().mean().backward()
    silent = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert silent == {"rope.freqs"}
    assert "y_embedder.y_embedding" in dict(network.named_buffers())


def test_model_errors(network: TinySTDiT, tmp_path: Path) -> None:
    inputs = network_inputs()
    with pytest.raises(ValueError, match="got None for ..fps., .width.."):
        network(**{**inputs, "fps": None, "width": None})
    for mask in (torch.ones(3, 10), torch.ones(2, 9), torch.zeros(2, 10)):
        with pytest.raises(ValueError, match="mask must be"):
            network(**{**inputs, "mask": mask})
    with pytest.raises(ValueError, match="in train mode y must be"):
        network.train()(**{**inputs, "y": inputs["y"][:, :, :6], "mask": None})
    with pytest.raises(ValueError, match="multiple of 4"):
        TinySTDiT(hidden_size=30, num_heads=4)
    with pytest.raises(ValueError, match="which is not there"):
        TinySTDiT(from_pretrained=tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="does not fit TinySTDiT"):
        TinySTDiT(hidden_size=16, num_heads=2, from_pretrained=model.WEIGHTS)
    (tmp_path / "cut.safetensors").write_bytes(model.WEIGHTS.read_bytes()[:-4])
    with pytest.raises(ValueError, match="cut.safetensors does not fit TinySTDiT"):
        TinySTDiT(from_pretrained=tmp_path / "cut.safetensors")


# ---------------------------------------------------------------- shipped weights


def test_shipped_weights_are_small_and_documented() -> None:
    folder = model.WEIGHTS.parent
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 3_000_000
    report = json.loads((folder / "training.json").read_text())
    assert {"codec", "teacher"} <= report.keys() and report["teacher"]["final_mse"] < 1.0


@torch.no_grad()
def test_shipped_teacher_draws_what_the_caption_says() -> None:
    teacher, vae, encoder = model.load_teacher(), TinyVAE(), TinyTextEncoder()
    encoder.y_embedder = teacher.y_embedder
    wanted = clips.contents()[::6]
    encoded = encoder.encode([content.caption for content in wanted])
    count, steps, scale = len(wanted), 20, 3.0
    z = torch.randn(count, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = {
        "fps": torch.full((count,), 8.0),
        "height": torch.full((count,), 64.0),
        "width": torch.full((count,), 64.0),
    }
    y = torch.cat([encoded["y"], encoder.null(count)])
    for step in range(steps):
        timestep = torch.full((2 * count,), 1000.0 * (1 - step / steps))
        out = teacher(torch.cat([z, z]), timestep, y, mask=encoded["mask"], **sizes)[:, :4]
        with_text, without = out.chunk(2)
        z = z + (without + scale * (with_text - without)) / steps
    shown = [clips.recognise(frames) for frames in clips.tensor_to_frames(vae.decode(z, num_frames=17))]
    assert sum(seen == content for seen, content in zip(shown, wanted)) >= 0.75 * count


def test_training_command_writes_weights_that_load(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    sizes = [
        "--clips",
        "8",
        "--codec-steps",
        "3",
        "--codec-batch",
        "4",
        "--steps",
        "3",
        "--batch",
        "4",
        "--save-every",
        "2",
    ]
    try:
        train_teacher.main(["--out", str(tmp_path), "--threads", "1", *sizes])
    finally:
        torch.set_num_threads(threads)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "codec.safetensors",
        "teacher.safetensors",
        "training.json",
    ]
    TinySTDiT(from_pretrained=tmp_path / "teacher.safetensors")
    TinyVAE(pretrained=False).load_state_dict(load_file(tmp_path / "codec.safetensors"))
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["teacher"]["steps"] == 3 and report["codec"]["final_mse"] > 0


BLOCK_LAYERS = (
    "attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2",
)  # fmt: skip
OTHER_LAYERS = (
    "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "fps_embedder.mlp.0", "fps_embedder.mlp.2", "t_block.1",
    "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2", "final_layer.linear",
)  # fmt: skip
GOLDEN_RED = [-0.384645, -0.443836, 1.078197]


def test_a_teacher_trained_with_masks_sees_given_frames_clean_and_is_judged_by_the_others(tmp_path: Path) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Recorder(TinySTDiT):
        def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            seen.append((x, kwargs["x_mask"]))
            return super().forward(x, *args, **kwargs)

    latents = torch.full((2, 4, 3, 4, 4), 7.0)
    mask = torch.tensor([[False, True, True], [True, True, True]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_teacher, "TinySTDiT", Recorder)
        _, loss = train_teacher.train_teacher(
            latents, ["a", "b"], height=32, width=32, steps=1, batch_size=2, lr=0.0, seed=0, save_every=1,
            save=tmp_path / "teacher.safetensors", draw_masks=lambda count, generator: mask,
        )  # fmt: skip
    x, told = seen[0]
    assert torch.equal(told, mask)
    assert torch.equal((x == 7.0).flatten(3).all(dim=3).all(dim=1), ~mask)
    # A new network answers 0, so its error is data - noise: with the seed's noise, of the generated frames alone.
    generator = torch.Generator().manual_seed(1)
    torch.randint(2, (2,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    error = (7.0 - noise).square().mean(dim=(1, 3, 4))
    assert loss == pytest.approx(((error[0, 1:].mean() + error[1].mean()) / 2).item(), rel=1e-5)
