"""Encoded captions: what the text encoder said, looked up."""

import os

import pytest
import torch

from opensora_perflow.hosts.encoded_captions import KIND, are_encoded, refuse_encoded
from opensora_perflow.hosts.v1 import encoded_text
from opensora_perflow.hosts.v1.encoded_text import EncodedText, encode_captions, read_latent_sizes, write_latent_sizes
from opensora_perflow.hosts.v2.encoded_text import perflow_encoded_t5
from opensora_perflow.training.shards import ShardWriter
from opensora_perflow.worlds.text import TinyTextEncoder

CAPTIONS = ["a red circle moving right", "a blue square", "a very long caption of more than ten words that is cut there"]
HEADER = {"text_encoder": {"type": "tiny"}, "model_max_length": 10, "output_dim": 32}


def encode(folder, captions=CAPTIONS, **others):
    return encode_captions(folder, captions, TinyTextEncoder().encode, HEADER, **others)


def test_embeddings_are_the_text_encoders(tmp_path):
    assert encode(tmp_path, batch_size=2) == 3
    found, expected = EncodedText(tmp_path), TinyTextEncoder()
    assert (found.model_max_length, found.output_dim) == (10, 32)
    texts = [CAPTIONS[2], CAPTIONS[0], CAPTIONS[0]]
    for encoded in (found.encode(texts), found.encode(**found.tokenize_fn(texts))):  # 1.2's call, and 1.3's
        for name, value in expected.encode(texts).items():
            assert torch.equal(encoded[name], value) and encoded[name].dtype == value.dtype
    one = {name: value.squeeze(0)[None] for name, value in found.tokenize_fn(CAPTIONS[1]).items()}  # 1.3's data set
    y = found.encode(one["input_ids"], attention_mask=one["attention_mask"])["y"]
    assert torch.equal(y, expected.encode([CAPTIONS[1]])["y"])
    assert EncodedText(tmp_path, dtype=torch.bfloat16).encode(texts)["y"].dtype == torch.bfloat16


def test_only_missing_captions_are_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_text, "ROWS", 2)
    assert encode(tmp_path, CAPTIONS[:1]) == 1 and encode(tmp_path) == 2 and encode(tmp_path) == 0
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["000000.safetensors", "000001.safetensors"]
    y = EncodedText(tmp_path).encode(CAPTIONS)["y"]
    assert torch.equal(y, TinyTextEncoder().encode(CAPTIONS)["y"])


def test_a_lost_shard_is_encoded_again_by_any_process(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_text, "ROWS", 1)
    encode(tmp_path)
    (tmp_path / "000001.safetensors").unlink()
    assert not are_encoded(tmp_path, CAPTIONS, HEADER["text_encoder"])
    assert encode(tmp_path, [*CAPTIONS, "a fourth"], rank=3, world=1) == 0  # of process 3 in a run of one there is no work
    os.utime(tmp_path / "index-00000.json", ns=(0, 0))
    encoded_text.encode_captions(tmp_path, [*CAPTIONS, "a fourth"], TinyTextEncoder().encode, HEADER, rank=1, world=2)
    encoded_text.encode_captions(tmp_path, [*CAPTIONS, "a fourth"], TinyTextEncoder().encode, HEADER)
    assert torch.equal(EncodedText(tmp_path).encode(CAPTIONS)["y"], TinyTextEncoder().encode(CAPTIONS)["y"])
    assert are_encoded(tmp_path, CAPTIONS, HEADER["text_encoder"])
    with pytest.raises(ValueError, match="text_encoder is {'type': 'tiny'} there and {'type': 't5'} here; encode into another"):
        are_encoded(tmp_path, CAPTIONS, {"type": "t5"})


def test_processes_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_text, "ROWS", 1)
    met = []  # the second process looks into the folder before the first one writes
    first = [lambda: met.append(encode(tmp_path, rank=1, world=2, barrier=lambda: None)), lambda: None]
    assert encode(tmp_path, rank=0, world=2, barrier=lambda: first.pop(0)()) == 2 and met == [1]
    assert torch.equal(EncodedText(tmp_path).encode(CAPTIONS)["y"], TinyTextEncoder().encode(CAPTIONS)["y"])


def test_captions_of_the_other_open_sora_are_refused(tmp_path):
    encode(tmp_path / "1")
    with pytest.raises(
        ValueError, match="'.*1' holds captions that were encoded for Open-Sora 1.x; run `opensora-perflow encode`"
    ):
        perflow_encoded_t5(str(tmp_path / "1"))
    ShardWriter(tmp_path / "2", KIND, {"text_encoder": {}}, 0, "").write(0, {"txt": torch.ones(1)}, {"captions": '["a"]'}, 1)
    with pytest.raises(ValueError, match="'.*2' holds captions that were encoded for Open-Sora 2.0; run"):
        EncodedText(tmp_path / "2")


def test_an_encoder_that_is_a_folder_encodes_nothing():
    refuse_encoded({"type": "t5"})
    for kind in ("perflow_encoded", "perflow_encoded_t5"):
        with pytest.raises(
            ValueError, match="takes its texts from the folder 'text', and nothing in it encodes; name the config"
        ):
            refuse_encoded({"type": kind, "folder": "text"})


def test_other_captions_are_refused(tmp_path):
    encode(tmp_path)
    with pytest.raises(ValueError, match="'a white star' is none of the 3 captions that were encoded"):
        EncodedText(tmp_path).encode(["a white star"])
    with pytest.raises(ValueError, match="was begun with other settings: output_dim is 32 there and 64 here"):
        encode_captions(tmp_path, CAPTIONS, TinyTextEncoder().encode, {**HEADER, "output_dim": 64})


def test_latents_have_the_sizes_that_were_written(tmp_path):
    with pytest.raises(ValueError, match="latents.json' says no sizes of latents"):
        read_latent_sizes(tmp_path)
    write_latent_sizes(tmp_path, {(17, 192, 192): (4, 5, 8, 8)})
    latent_size = read_latent_sizes(tmp_path)
    assert latent_size(17, 192, 192) == (4, 5, 8, 8)
    with pytest.raises(ValueError, match="does not have the latents of 1 frames of 192 x 192"):
        latent_size(1, 192, 192)
