"""record.jsonl: whole lines, whatever ended the run."""

import json
import math

from opensora_perflow.training.record import Record, read_record


def test_a_line_is_read_as_it_was_written(tmp_path):
    record = Record(tmp_path / "run")
    record.write("step", 3, loss=0.12345678, window_loss=[1.0, None], deep={"a": (1, math.nan)})
    assert read_record(tmp_path / "run") == [
        {"kind": "step", "step": 3, "loss": 0.123457, "window_loss": [1.0, None], "deep": {"a": [1, None]}}
    ]


def test_half_a_line_of_a_killed_run_is_left_out_and_ended(tmp_path):
    record = Record(tmp_path)
    record.write("step", 0, loss=1.0)
    with record.path.open("a") as opened:
        opened.write('{"kind": "step", "st')
    assert [line["step"] for line in read_record(tmp_path)] == [0]
    Record(tmp_path).write("step", 1, loss=2.0)
    assert [line["step"] for line in read_record(tmp_path)] == [0, 1]
    assert all(json.loads(line) for i, line in enumerate(record.path.read_text().splitlines()) if i != 1)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Record(None).write("step", 0)
    assert list(tmp_path.iterdir()) == []
