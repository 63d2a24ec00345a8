"""Labels that can be drawn, in any script."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from matplotlib import font_manager

from opensora_perflow.tools import fonts, plots

UNASSIGNED = "\U000e1000"


def only_elsewhere() -> str:
    """A letter that the usual font lacks and another of matplotlib's fonts has."""
    usual = fonts.characters_of(font_manager.findfont("DejaVu Sans"))
    return chr(
        min(code for code in fonts.characters_of(font_manager.findfont("STIXGeneral")) - usual if chr(code).isprintable())
    )


def test_usual_captions_stay_as_they_are():
    captions = ["a purple triangle moving right", "ein grüner Kreis", "красный круг"]
    assert fonts.labels(captions) == [fonts.Label(caption, fonts.usual_families()) for caption in captions]


def test_a_letter_of_another_font_is_drawn_with_it():
    (label,) = fonts.labels([f"a {only_elsewhere()}"])
    assert label.text == f"a {only_elsewhere()}" and len(label.families) == 2
    path = font_manager.findfont(font_manager.FontProperties(family=label.families[-1]))
    assert ord(only_elsewhere()) in fonts.characters_of(path)


def test_captions_without_a_font_are_numbered_and_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        found = fonts.labels(["a cat", f"a {UNASSIGNED}", f"b {UNASSIGNED}"])
    assert [label.text for label in found] == ["a cat", "caption 2", "caption 3"]
    assert len(caplog.records) == 1 and "caption 2 is 'a " in caplog.text and "caption 3 is 'b " in caplog.text


def test_a_font_of_boxes_is_no_font(monkeypatch):
    boxes = font_manager.FontEntry(fname="boxes.ttf", name="Last Resort High-Efficiency", style="normal", weight=400)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [boxes])
    assert fonts._system_fonts.__wrapped__() == []


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("cafe\u0301", "café"),
        ("two\nlines\tand  more ", "two lines and more"),
        ("very " * 30, "very very very very very very v..."),
    ],
)
def test_labels_are_one_short_line(caption, text):
    assert fonts.labels([caption])[0].text == text and len(text) <= fonts.LONGEST


@pytest.mark.filterwarnings("error")
def test_pictures_of_odd_captions(tmp_path):
    """No glyph is missing, and dollar signs begin no formula."""
    videos = {"one": np.zeros((4, 3, 16, 16, 3), np.uint8)}
    captions = fonts.labels(["cost $5 \\frac{$", UNASSIGNED, only_elsewhere(), "a cat"])
    assert plots.side_by_side(videos, captions).shape[0] == 3
    plots.frames_figure(tmp_path / "frames.png", videos, captions, num_frames=2)
    assert (tmp_path / "frames.png").stat().st_size > 1000
