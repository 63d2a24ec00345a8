"""Files of a run appear together or not at all, and the user's files stay."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest

from opensora_perflow import atomic
from opensora_perflow.atomic import left_by_killed, replacing
from opensora_perflow.tools import outputs
from opensora_perflow.tools.outputs import Kind, new_folder, together, unfinished

KIND = Kind(
    names=("video", "weights", "numbers"),
    marks=("weights", "numbers"),
    folder="clips",
    is_own=lambda name: name.startswith("clip"),
)
MINE = ("notes", "clips/holiday", "photos/deep/one", "photos/empty")


def write_run(out: Path, label: str, clips: int = 1) -> None:
    with together(out, KIND) as folder:
        for name in (*KIND.names, *(f"clips/clip{place}" for place in range(clips))):
            with replacing(folder / name) as temporary:  # as the demo does: a kill leaves halves of files
                temporary.write_text(label)


def write_mine(out: Path) -> None:
    for name in MINE[:3]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    (out / MINE[3]).mkdir()
    (out / "link").symlink_to("notes")


def contents(out: Path) -> dict[str, str]:
    return {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}


def whole(label: str, clips: int = 1) -> dict[str, str]:
    return {name: label for name in (*KIND.names, *(f"clips/clip{place}" for place in range(clips)))}


OWN = {**dict.fromkeys(MINE[:3], "mine"), "link": "mine"}


@pytest.fixture(params=["exchange", "no exchange", "no hard links", "current folder", "no place beside"])
def way(request, monkeypatch, tmp_path):
    """All ways in which files take their places."""

    def refuse(*args: object) -> None:
        raise OSError("not here")

    if request.param == "no exchange":
        monkeypatch.setattr(outputs, "_exchange", refuse)
    if request.param == "no hard links":
        monkeypatch.setattr(outputs.os, "link", refuse)
    if request.param == "current folder":
        (tmp_path / "out").mkdir()
        monkeypatch.chdir(tmp_path / "out")
    if request.param == "no place beside":
        monkeypatch.setattr(outputs.os.path, "ismount", lambda path: True)
    return request.param


def test_a_second_run_replaces_the_first_and_nothing_of_the_user(way, tmp_path):
    out = tmp_path / "out"
    write_run(out, "first", clips=3)
    write_mine(out)
    out.chmod(0o750)
    inode = (out / "notes").stat().st_ino
    write_run(out, "second", clips=2)
    assert contents(out) == {**whole("second", clips=2), **OWN}
    assert (out / "photos" / "empty").is_dir() and (out / "link").is_symlink()
    assert (out / "notes").stat().st_ino == inode and out.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_without_clips_leaves_those_of_the_first(way, tmp_path):
    out = tmp_path / "out"
    write_run(out, "first", clips=2)
    write_run(out, "second", clips=0)
    assert contents(out) == {**whole("second", clips=0), "clips/clip0": "first", "clips/clip1": "first"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_run_that_fails_changes_nothing(way, tmp_path, error):
    out = tmp_path / "out"
    write_run(out, "first")
    write_mine(out)
    with pytest.raises(error), together(out, KIND) as folder:
        (folder / "video").write_text("second")
        raise error("disk full")
    assert contents(out) == {**whole("first"), **OWN}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_first_run_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OSError), together(tmp_path / "out", KIND):
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())


def test_files_of_other_origin_are_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "numbers").write_text("mine")
    with pytest.raises(ValueError, match="holds numbers, but no whole earlier run .weights and numbers.; move"):
        write_run(tmp_path / "out", "first")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is no folder"):
        write_run(tmp_path / "file", "first")
    assert contents(tmp_path) == {"out/numbers": "mine", "file": "mine"}


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("elsewhere")])
def test_a_file_in_the_place_of_the_subfolder_is_not_replaced(tmp_path, make):
    write_run(tmp_path / "out", "first", clips=0)
    make(tmp_path / "out" / "clips")
    with pytest.raises(ValueError, match="clips is a file or a link"):
        write_run(tmp_path / "out", "second")
    assert os.path.lexists(tmp_path / "out" / "clips")


def test_files_of_other_origin_that_appear_during_a_run_are_not_replaced(tmp_path):
    with pytest.raises(ValueError, match="holds numbers"), together(tmp_path / "out", KIND) as folder:
        (folder / "numbers").write_text("first")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "numbers").write_text("mine")
    assert contents(tmp_path) == {"out/numbers": "mine"}


def test_files_put_there_during_a_run_stay(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_run(out, "first")
    exchange = outputs._exchange

    def late(new: Path, old: Path) -> None:
        (old / "late").write_text("mine")
        exchange(new, old)

    monkeypatch.setattr(outputs, "_exchange", late)
    write_run(out, "second")
    assert contents(out) == {**whole("second"), "late": "mine"}


def test_two_runs_in_one_folder_do_not_mix(tmp_path):
    out = tmp_path / "out"
    with together(out, KIND) as slow:
        for name in KIND.names:
            (slow / name).write_text("slow")
        write_run(out, "fast", clips=2)
        assert contents(out) == whole("fast", clips=2) and slow.is_dir()
    assert contents(out) == {**whole("slow", clips=0), "clips/clip0": "fast", "clips/clip1": "fast"}


def test_what_a_killed_run_left_is_taken_away(tmp_path):
    """Killed while it wrote: halves of files. Killed after the exchange: the old run, and a file put there meanwhile."""
    out = tmp_path / "out"
    write_run(out, "first", clips=0)
    left = {"unfinished-a": [".video.half", "clips/clip0", "clips/.clip1.half"], "finished-b": [*KIND.names, "late"]}
    for folder, names in left.items():
        for name in names:
            path = tmp_path / f".out.{folder}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("left")
    write_run(out, "second", clips=0)
    assert contents(tmp_path) == {f"out/{name}": text for name, text in {**whole("second", 0), "late": "left"}.items()}
    assert not (out / "clips").exists()


def test_a_run_killed_while_it_replaced_files_one_by_one_can_be_repeated(tmp_path):
    out = tmp_path / "out"
    write_run(out, "first")
    (out / "numbers").unlink()
    (tmp_path / ".out.finished-a").mkdir()
    write_run(out, "second")
    assert contents(out) == whole("second")


def test_a_run_stands_in_no_folder_while_files_are_replaced_one_by_one(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_run(out, "first")
    monkeypatch.chdir(out)
    replace, seen = os.replace, []

    def watched(source: Path, target: Path) -> None:
        if Path(target).is_relative_to(out):
            seen.append((Path(target).name, KIND.wrote(out)))
        replace(source, target)

    monkeypatch.setattr(outputs.os, "replace", watched)
    write_run(out, "second")
    assert [name for name, _ in seen][-1] == "numbers" and not any(stood for _, stood in seen)


def test_a_linked_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    write_run(tmp_path / "out", "first")
    write_run(tmp_path / "out", "second")
    assert (tmp_path / "out").is_symlink() and contents(tmp_path / "real") == whole("second")


def test_names_with_brackets_are_names(tmp_path):
    (tmp_path / ".out[1].unfinished-a").mkdir()
    write_run(tmp_path / "out[1]", "first")
    assert [path.name for path in tmp_path.iterdir()] == ["out[1]"]


KILLS = 30


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_leaves_all_of_one_run(tmp_path):
    """benchmarks/kills.py does this to the whole demo."""
    out, rng = tmp_path / "out", random.Random(0)
    write_run(out, "first")
    write_mine(out)
    for kill in range(KILLS):
        pid = os.fork()
        if pid == 0:
            for place in itertools.count():
                write_run(out, f"{kill}-{place}", clips=place % 3 + 1)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = contents(out)
        label = found["numbers"]
        clips = sum(name.startswith("clips/clip") for name in found)
        assert found == {**whole(label, clips), **OWN}
    write_run(out, "last")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and contents(out) == {**whole("last"), **OWN}


@pytest.mark.parametrize("write, name", [(new_folder, "student"), (replacing, "student.pt")])
def test_what_killed_processes_left_of_an_output_is_taken_away(write, name, tmp_path):
    """And neither what one that lives is writing, nor what has another name."""
    out, other = tmp_path / name, tmp_path / ".student.old"
    other.mkdir()
    pid = os.fork()
    if pid == 0:
        with write(out) as place:
            place.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (left,) = unfinished(out)
    with write(out) as living:
        assert not left.exists() and len(unfinished(out)) == 1
        with pytest.raises(OSError, match="disk full"), write(out):
            raise OSError("disk full")
        living.touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".student.old", name]


def test_what_cannot_be_locked_is_left_alone(tmp_path, monkeypatch):
    """Such as another user's, and on a file system without locks."""
    left = tmp_path / ".student.unfinished-old"
    left.mkdir()
    monkeypatch.setattr("os.open", lambda *_: (_ for _ in ()).throw(PermissionError("another user's")))
    assert list(left_by_killed(tmp_path, ".student.unfinished-")) == [] and left.exists()


def test_a_folder_that_is_swept_before_its_lock_is_there_is_made_again(tmp_path, monkeypatch):
    made = []

    def swept_at_first(folder, wait):
        made.append(folder)
        if len(made) == 1:
            folder.rmdir()

    monkeypatch.setattr(atomic, "_lock", swept_at_first)
    with replacing(tmp_path / "student.pt") as temporary:
        temporary.touch()
    assert len(made) == 2 and [path.name for path in tmp_path.iterdir()] == ["student.pt"]
