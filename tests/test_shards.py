"""Folders of shards: nothing half-written is read as whole, and whatever is missing is written again."""

import json
import os

import pytest
import torch

from opensora_perflow.training.shards import Shards, ShardWriter, file_name

KIND, REMEDY = "numbers", "write them"
HEADER = {"size": 3, "edges": (1.0, 0.5)}


def writer(folder, rank=0, **header):
    return ShardWriter(folder, KIND, {**HEADER, **header}, rank, "write elsewhere")


def numbers(place):
    return {"x": torch.arange(6.0).view(2, 3) + place}


def write(folder, places, rank=0):
    one = writer(folder, rank)
    for place in places:
        one.write(place, numbers(place), {"said": f"shard {place}"}, 2, first=2 * place)
    return one


def read(folder):
    return Shards.open(folder, KIND, REMEDY)


def test_what_was_written_is_read(tmp_path):
    write(tmp_path, [0, 2])
    write(tmp_path, [1], rank=1)
    shards = read(tmp_path)
    assert list(shards.shards) == [0, 1, 2] and shards.header == {"size": 3, "edges": [1.0, 0.5]}
    assert torch.equal(shards.tensor(1, "x")[1], numbers(1)["x"][1])
    assert shards.metadata(2) == {"said": "shard 2"} and shards.shards[2].about == {"first": 4}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *map(file_name, range(3)),
        "index-00000.json",
        "index-00001.json",
    ]


def test_a_shard_without_an_entry_is_not_there_and_leftovers_go(tmp_path):
    write(tmp_path, [0])
    (tmp_path / file_name(1)).write_bytes(b"killed before the index was written")
    (tmp_path / f".{file_name(1)[:6]}.abc.safetensors").write_bytes(b"killed while the shard was written")
    (tmp_path / ".index-00000.abc.json").write_text("killed while the index was written")
    assert list(read(tmp_path).shards) == [0]
    again = writer(tmp_path)
    assert again.is_there(0) and not again.is_there(1)
    again.write(1, numbers(1), {}, 2, first=2)
    assert list(read(tmp_path).shards) == [0, 1] and not list(tmp_path.glob(".*"))
    assert torch.equal(read(tmp_path).tensor(1, "x"), numbers(1)["x"])


def test_a_shard_that_was_cut_or_lost_is_refused_and_written_again(tmp_path):
    write(tmp_path, [0, 1])
    file = tmp_path / file_name(1)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"000001.safetensors' has \d+ bytes, and the index says \d+; remove the file"):
        read(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="000001.safetensors' is missing"):
        read(tmp_path)
    # By another process than before: the older index names the lost shard, too.
    other = writer(tmp_path, rank=5)
    assert other.is_there(0) and not other.is_there(1)
    os.utime(tmp_path / "index-00000.json", ns=(0, 0))
    other.write(1, numbers(7), {}, 2)
    assert torch.equal(read(tmp_path).tensor(1, "x"), numbers(7)["x"])


def test_a_shard_that_was_edited_is_refused(tmp_path):
    write(tmp_path, [0])
    file = tmp_path / file_name(0)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not what was written .its SHA-256 differs"):
        read(tmp_path).tensor(0, "x")


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no numbers: no index; write them"):
        read(tmp_path)
    writer(tmp_path)
    with pytest.raises(ValueError, match="holds no numbers: no index"):
        read(tmp_path)
    write(tmp_path, [0])
    with pytest.raises(ValueError, match="was begun with other settings: size is 3 there and 4 here; write elsewhere"):
        writer(tmp_path, size=4)
    with pytest.raises(ValueError, match="holds numbers, and letters are wanted"):
        Shards.open(tmp_path, "letters", REMEDY)
    index = tmp_path / "index-00001.json"
    index.write_text((tmp_path / "index-00000.json").read_text().replace('"size": 3, "edges"', '"size": 5, "edges"'))
    with pytest.raises(ValueError, match="disagree: size is 3 there and 5 here"):
        read(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"format": 1', b"\xff\xfe", json.dumps({"format": "x/9"}).encode()])
def test_a_damaged_index_is_refused(tmp_path, damage):
    write(tmp_path, [0])
    (tmp_path / "index-00000.json").write_bytes(damage)
    for call in (read, writer):
        with pytest.raises(ValueError, match="index-00000.json' is no index that this package wrote"):
            call(tmp_path)
