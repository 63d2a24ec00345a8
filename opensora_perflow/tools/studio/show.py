"""What the studio shows, as HTML that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np

from opensora_perflow.tools.page import charts
from opensora_perflow.tools.page.claims import claims
from opensora_perflow.tools.page.runs import Run
from opensora_perflow.tools.studio.students import Comparison
from opensora_perflow.worlds.clips import FPS
from opensora_perflow.worlds.videos import write_video

_TEMPLATES = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    loader=jinja2.FunctionLoader(lambda name: files(__package__).joinpath(name).read_text(encoding="utf-8")),
)


def comparison(found: Comparison) -> str:
    """Looping videos beside each other with their cost, and the windows."""
    videos = [(one, _mp4(one.frames)) for one in found.videos]
    page = _TEMPLATES.get_template("comparison.html")
    return page.render(prompt=found.prompt, videos=videos, notes=found.notes) + drawn(found.run, ("windows",))


def drawn(run: Run, sections: Sequence[str]) -> str:
    """The report's charts of some of its sections, those that a run has."""
    rendered = [(chart, charts.render(chart, [run])[0]) for chart in charts.CHARTS if chart.name in sections]
    return _TEMPLATES.get_template("charts.html").render(drawn=[pair for pair in rendered if pair[1]])


def run(one: Run) -> str:
    """A run as it is now: what holds so far, and its charts."""
    return _TEMPLATES.get_template("claims.html").render(claims=claims(one)) + drawn(one, ("training", "windows", "quality"))


def _mp4(frames: np.ndarray) -> str:
    """Base64 of uint8 [T, H, W, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        return base64.b64encode(write_video(Path(folder) / "video.mp4", frames, fps=FPS).read_bytes()).decode()
