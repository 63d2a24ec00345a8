"""`perflow_captions`: rows and settings that would be learned as something else are refused when the set is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _harness import run_python

pytestmark = pytest.mark.host

SIZES = {"num_frames": 5, "image_size": [32, 48]}
TAKEN = {  # table -> captions, which pandas alone would read otherwise
    "text\na cat\n007 agents\n": ["a cat", "007 agents"],
    'text\n"a cat, asleep"\n\na dog\n': ["a cat, asleep", "a dog"],
    "text\n" + "very " * 40_000 + "small\n": ["very " * 40_000 + "small"],
    "\ufefftext\nein grüner Kreis\n": ["ein grüner Kreis"],
    "id, text\n1,none of them\n": ["none of them"],
}
REFUSED = {  # table -> part of the message
    "text,id\na cat,1\n,2\n": "row 2: ''",
    "text,id\na cat,1\n  ,2\n": "row 2: '  '",
    "text\nNA\na cat\nnull\n": "row 1: 'NA', row 3: 'null'",
    "text\na cat\nnan\n": "row 2: 'nan'",
    "text\na cat\n42\n": "row 2: '42'",
    "text\n007\n1e3\n": "row 1: '007', row 2: '1e3'",
    'text\na cat\n""\n': "empty rows",
    "text\n": "no captions",
    "text\na cat\na cat, asleep\n": "line 3 has 2",
    "text\na cat, asleep\n": "line 2 has 2",
    "path\nx.mp4\n": "needs a column 'text'",
    "text,height\na cat,32\na dog,\n": "column height: row 2: nan",
    "text,num_frames\na cat,0\n": "column num_frames: row 1: 0",
    "text,num_frames\na cat,2.5\n": "column num_frames: row 1: 2.5",
    "text,width\na cat,wide\n": "column width: row 1: 'wide'",
}
SETTINGS = [
    ({"fps": -1}, "fps of perflow_captions must be > 0"),
    ({"fps": 0}, "fps of perflow_captions must be > 0"),
    ({"fps": "nan"}, "fps of perflow_captions must be > 0"),
    ({"fps": "inf"}, "fps of perflow_captions must be > 0"),
    ({"fps": "24 fps"}, "fps of perflow_captions must be a number"),
    ({"image_size": "240x426"}, "image_size of perflow_captions must be (height, width)"),
    ({"image_size": "64"}, "image_size of perflow_captions must be (height, width)"),
    ({"image_size": 240}, "image_size of perflow_captions must be (height, width)"),
    ({"image_size": [240]}, "image_size of perflow_captions must be (height, width)"),
    ({"image_size": ["240", "426"]}, "height of perflow_captions must be an integer >= 1"),
    ({"image_size": [240, -1]}, "width of perflow_captions must be an integer >= 1"),
    ({"num_frames": "51"}, "num_frames of perflow_captions must be an integer >= 1"),
    ({"num_frames": 0}, "num_frames of perflow_captions must be an integer >= 1"),
    ({"num_frames": None}, "has no column num_frames"),
    ({"data_path": None}, "data_path of perflow_captions must be"),
]


def test_captions_are_taken_as_written_or_refused_with_the_row(host_root: Path, host_tag: str, tmp_path: Path) -> None:
    if host_tag == "1.0":
        pytest.skip("Open-Sora 1.0 has no VariableVideoTextDataset")
    cases: list[dict[str, Any]] = []
    for place, text in enumerate([*TAKEN, *REFUSED]):
        (tmp_path / f"{place}.csv").write_text(text, encoding="utf-8")
        cases.append({"data_path": str(tmp_path / f"{place}.csv"), **SIZES})
    (tmp_path / "cp1252.csv").write_bytes("text\nein grüner Kreis\n".encode("cp1252"))
    cases.append({"data_path": str(tmp_path / "cp1252.csv"), **SIZES})
    (tmp_path / "utf16.csv").write_bytes("text\nein grüner Kreis\n".encode("utf-16"))
    cases.append({"data_path": str(tmp_path / "utf16.csv"), **SIZES})
    cases += [{**cases[0], **changes} for changes, _ in SETTINGS]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [Path(__file__).with_name("_captions_worker.py"), host_root, tmp_path / "cases.json", tmp_path / "out.json"]
    run_python([str(part) for part in command], nproc=1, log=tmp_path / "worker.log", cwd=tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())
    for one, captions in zip(found, TAKEN.values()):
        assert one == {"captions": captions, "shape": [3, 5, 32, 48], "fps": 24}
    expected = [*REFUSED.values(), "cp1252.csv, line 2: not utf-8: byte 0xfc", "utf16.csv", *(part for _, part in SETTINGS)]
    for one, part in zip(found[len(TAKEN) :], expected, strict=True):
        assert one["error"].startswith("ValueError: ") and part in one["error"]
