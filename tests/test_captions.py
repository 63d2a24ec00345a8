"""Odd tables: no row, accent or half of a caption is lost in silence, and no video gets another's caption."""

from __future__ import annotations

import csv
import logging
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from opensora_perflow.worlds.clips import read_clips, write_clips
from opensora_perflow.worlds.tables import read_table
from opensora_perflow.worlds.videos import write_video

FRAMES = np.full((2, 16, 16, 3), 90, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the video x.mp4."""
    video(tmp_path / "set" / "x.mp4")
    return tmp_path / "set"


def video(path: Path) -> Path:
    return write_video(path, FRAMES)


def read(source: Path):
    return read_clips(source, num_frames=2, height=16, width=16)


def captions(source: Path) -> dict[str, str]:
    """Path of each video from the folder on -> its caption."""
    folder = source if source.is_dir() else source.parent
    found = read(source)
    return {path.relative_to(folder).as_posix(): text for path, text in zip(found.paths, found.captions)}


# ---------------------------------------------------------------- reading a table


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_read(folder, encoding):
    (folder / "t.csv").write_text("path,text\nx.mp4,ein grüner Kreis\n", encoding=encoding)
    assert captions(folder / "t.csv") == captions(folder) == {"x.mp4": "ein grüner Kreis"}


@pytest.mark.parametrize(
    ("encoding", "match"), [("cp1252", "line 2: not utf-8: byte 0xfc.*cp1252.*'ü'"), ("utf-16-le", "UTF-16")]
)
def test_other_encodings_are_named(folder, encoding, match):
    (folder / "t.csv").write_bytes("path,text\nx.mp4,ein grüner Kreis\n".encode(encoding))
    for source in (folder / "t.csv", folder):
        with pytest.raises(ValueError, match=f"t.csv.*{match}"):
            read(source)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ("text,path\nonly text\na cat,x.mp4\n", "t.csv: the header names 2 columns.*line 2 has 1"),
        ("path,text\nx.mp4,a cat\nx.mp4,a cat, asleep\n", "t.csv.*line 3 has 3.*quotes"),
        ('path,text\nx.mp4,"a cat\nx.mp4,a dog\n', "t.csv, line 3.*quotes"),
        ("path,text,text\nx.mp4,a cat,a dog\n", "t.csv has two columns named 'text'"),
        ("path,text\n,a cat\n", "t.csv: no path in line 2"),
        ("path;text\nx.mp4;a cat\n", "t.csv names no videos: its columns are 'path;text'"),
    ],
)
def test_broken_tables_are_refused_with_the_line(folder, table, match):
    (folder / "t.csv").write_text(table)
    with pytest.raises(ValueError, match=match):
        read(folder / "t.csv")


def test_empty_lines_and_spaces_do_no_harm(folder):
    (folder / "t.csv").write_text("path, text\n\n x.mp4, a cat\n   \n,\n")
    assert captions(folder / "t.csv") == {"x.mp4": "a cat"}


def test_a_caption_of_any_length(folder):
    (folder / "t.csv").write_text(f"path,text\nx.mp4,{'very ' * 40_000}small\n")
    before = csv.field_size_limit()
    assert len(read(folder / "t.csv").captions[0]) > 200_000
    assert csv.field_size_limit() == before  # other code of the process keeps its limit


def test_lines_are_counted_as_an_editor_does(tmp_path):
    (tmp_path / "t.csv").write_text('path,text\nx.mp4,"two\nlines"\ny.mp4,one\n')
    assert [row.line for row in read_table(tmp_path / "t.csv")] == [3, 4]


# ---------------------------------------------------------------- which video a row means


def test_two_captions_of_one_video_are_two_clips(folder):
    (folder / "t.csv").write_text("path,text\nx.mp4,a cat\nx.mp4,a small animal\n")
    for source in (folder / "t.csv", folder):
        found = read(source)
        assert found.captions == ["a cat", "a small animal"] and found.frames.shape[0] == 2


def test_all_tables_of_a_folder_count(folder):
    video(folder / "y.mp4")
    video(folder / "more" / "z.mp4")
    (folder / "a.csv").write_text("path,text\nx.mp4,a cat\n")
    (folder / "b.csv").write_text("path,text\ny.mp4,a dog\nx.mp4,a cat\n")
    (folder / "more" / "c.csv").write_text("path,text\nz.mp4,a cow\n")
    (folder / "prices.csv").write_bytes("name,price\nK\xe4se,3\n".encode("cp1252"))  # not about videos, in any encoding
    assert captions(folder) == {"x.mp4": "a cat", "y.mp4": "a dog", "more/z.mp4": "a cow"} and len(read(folder)) == 3


def test_equal_names_in_two_folders_keep_their_captions(folder, tmp_path):
    for name in ("a", "b"):
        video(folder / name / "x.mp4")
    rows = "".join(f"{folder / name / 'x.mp4'},in {name}\n" for name in "ba")
    (folder / "t.csv").write_text(f"path,text\n{rows}")
    expected = {"a/x.mp4": "in a", "b/x.mp4": "in b", "x.mp4": "x"}
    assert captions(folder) == expected
    folder.rename(tmp_path / "moved")
    assert captions(tmp_path / "moved") == expected
    assert captions(tmp_path / "moved" / "t.csv") == {"a/x.mp4": "in a", "b/x.mp4": "in b"}


def test_a_deleted_video_does_not_leave_its_caption_to_another(folder, caplog):
    (folder / "t.csv").write_text("path,text\na/x.mp4,in a\nb/x.mp4,in b\n")
    assert captions(folder) == {"x.mp4": "x"}
    (folder / "t.csv").write_text("path,text\n/old/a/x.mp4,in a\n/older/b/x.mp4,in b\n")
    assert captions(folder) == {"x.mp4": "x"}
    (folder / "t.csv").write_text("path,text\n/old/a/x.mp4,in a\n")
    (folder / "u.csv").write_text("path,text\n/old/b/x.mp4,in b\n")
    with caplog.at_level(logging.WARNING):
        assert captions(folder) == {"x.mp4": "x"}
    assert "rows of different videos could mean it" in caplog.text


def test_links_to_one_file_are_two_videos(folder):
    for name in "ab":
        (folder / f"{name}.mp4").symlink_to(folder / "x.mp4")
    (folder / "t.csv").write_text("path,text\na.mp4,first\nb.mp4,second\n")
    assert captions(folder) == {"a.mp4": "first", "b.mp4": "second", "x.mp4": "x"}


def test_a_copied_folder_has_its_captions(tmp_path):
    table = write_clips(tmp_path / "here", 2)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    found = read(tmp_path / "there" / "clips.csv")
    assert found.captions == [row.cells["text"] for row in read_table(tmp_path / "there" / table.name)]
    assert {path.parent.name for path in found.paths} == {"there"}


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_other_systems(folder, on_disk, in_table):
    name = "Küche/café.mp4"
    video(folder / unicodedata.normalize(on_disk, name))
    (folder / "t.csv").write_text(f"path,text\n{unicodedata.normalize(in_table, name)},a café\n", encoding="utf-8")
    for source in (folder / "t.csv", folder):
        assert "a café" in captions(source).values()


@pytest.mark.parametrize(
    "written", [r"sub\y.mp4", r".\sub\y.mp4", "Sub/Y.MP4", " sub/y.mp4 ", r"C:\clips\sub\y.mp4", "D:/set/sub/y.mp4"]
)
def test_paths_of_windows(folder, written):
    video(folder / "sub" / "y.mp4")
    (folder / "t.csv").write_text(
        f"path,text\n{written},a dog\n{written.replace('sub', 'gone').replace('Sub', 'gone')},a cat\n"
    )
    assert captions(folder)["sub/y.mp4"] == "a dog"
    assert captions(folder / "t.csv") == {"sub/y.mp4": "a dog"}


def test_a_path_as_long_as_a_caption_is_a_video_that_is_not_there(folder, caplog):
    (folder / "t.csv").write_text(f"path,text\n{'very ' * 2000}long,a cat\nx.mp4,a dog\n")
    with caplog.at_level(logging.WARNING):
        assert captions(folder / "t.csv") == {"x.mp4": "a dog"}
    assert "skipped 1 of 2" in caplog.text
