"""The studio's page in gradio. What is shown comes from the other files of this folder."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio
import torch

from opensora_perflow.tools import report
from opensora_perflow.tools.studio import runs, show
from opensora_perflow.tools.studio.students import MOST_STEPS, Studio, find_students

TITLE = "PeRFlow studio"
EVERY = 5.0
"""Seconds between two looks at a run."""
CSS = """
.gradio-container { max-width: 1360px !important; margin: 0 auto; }
.studio-grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
.studio-charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); margin-top: 14px; }
.studio-grid figure { margin: 0; padding: 8px; border: 1px solid #d9dde3; border-radius: 6px; }
.studio-grid figure, .studio-grid figure * { background: #fff; color: #1d2430; }
.studio-grid video { display: block; width: 100%; max-width: 420px; image-rendering: pixelated; }
.studio-grid svg { display: block; width: 100%; height: auto; }
.studio-grid figcaption, .studio-dim { font-size: .9rem; }
.studio-note { background: #fff7dc; color: #5b4a00; padding: 6px 10px; border-radius: 6px; }
.studio-claims, .studio-claims * { border: 0 !important; }
.studio-claims td { padding: 2px 12px 2px 0; vertical-align: top; }
"""
NONE_YET = (
    "No student is here yet. Train the demo's in the tab Train and watch (quick: one minute), or run the command "
    "opensora-perflow demo."
)


def build(places: Sequence[Path], out: Path, training: runs.Training) -> gradio.Blocks:
    """The page.

    Args:
        places: Where students and runs are looked for. The page names no other place.
        out: Folder of the demo that the page trains, one of the places.
        training: Starts that demo.
    """
    studio = Studio()

    def sample(name: str | None, prompt: str, steps: float, seed: float | None) -> str:
        checkpoint = find_students(places).get(name or "")
        if checkpoint is None:
            raise gradio.Error(NONE_YET, print_exception=False)
        try:
            return show.comparison(studio.compare(checkpoint, prompt, int(steps), int(seed or 0)))
        except (ValueError, OSError) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    def look(name: str | None, student: str | None, seen: Any, known: list[str]) -> tuple[Any, ...]:
        """The chosen run, and lists of what there is: each is sent only where it changed."""
        found, students = runs.find_runs(places), find_students(places)
        if training.runs:
            found.setdefault(str(out), out)
        name = name if name in found else next(iter(found), None)
        student = student if student in students else next(iter(students), None)
        now = (name, *(() if name is None else runs.stamp(found[name])))
        one = None if name is None or now == seen else runs.read(found[name])
        lists = [*found, *students]
        return (
            training.told(),
            gradio.skip() if one is None else show.run(one),
            seen if one is None else now,
            gradio.skip() if lists == known else gradio.Dropdown(choices=list(found), value=name),
            gradio.skip() if lists == known else gradio.Dropdown(choices=list(students), value=student),
            lists,
        )

    def train(quick: bool) -> tuple[str, Any]:
        training.start(quick)
        return training.told(), gradio.Dropdown(choices=list({str(out): out, **runs.find_runs(places)}), value=str(out))

    def stop() -> str:
        training.stop()
        return training.told()

    first = list(find_students(places))
    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        gradio.Markdown(f"# {TITLE}\nA tiny video model and its few-step student, from the same noise.")
        seen, known = gradio.State(()), gradio.State([])
        with gradio.Tab("Sample"), gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                student = gradio.Dropdown(first, value=next(iter(first), None), label="Student", elem_id="student")
                prompt = gradio.Textbox("a red circle moving right", label="Prompt", elem_id="prompt",
                                        info=f"for example {', '.join(sorted(report.KNOWN)[:2])}")  # fmt: skip
                steps = gradio.Slider(1, MOST_STEPS, value=4, step=1, label="Steps of the student", elem_id="steps")
                seed = gradio.Number(0, precision=0, label="Seed", elem_id="seed")
                button = gradio.Button("Sample", variant="primary", elem_id="sample")
            with gradio.Column(scale=5, min_width=320):
                shown = gradio.HTML("" if first else f'<p class="studio-note">{NONE_YET}</p>', elem_id="shown")
        with gradio.Tab("Train and watch"):
            with gradio.Row():
                run = gradio.Dropdown(label="Run", elem_id="run")
                quick = gradio.Checkbox(True, label="quick: one minute instead of two", elem_id="quick")
                start = gradio.Button(f"Train the demo's student into {out}", elem_id="train")
                end = gradio.Button("Stop", elem_id="stop")
            told = gradio.Markdown(elem_id="told")
            watched = gradio.HTML('<p class="studio-dim">No run yet.</p>', elem_id="watched")
        # One at a time: CPU seconds are those of the process.
        alone: dict[str, Any] = {"concurrency_id": "alone", "concurrency_limit": 1}
        button.click(sample, [student, prompt, steps, seed], shown, **alone)
        start.click(train, quick, [told, run])
        end.click(stop, None, told)
        outputs = [told, watched, seen, run, student, known]
        for event in (gradio.Timer(EVERY).tick, page.load, run.change):
            event(look, [run, student, seen, known], outputs, show_progress="hidden", **alone)
    return page


def serve(places: Sequence[Path], out: Path, port: int | None, share: bool, ready: Callable[[str], None]) -> None:
    """Show the page until Ctrl-C; a demo that it trains ends with it.

    Args:
        port: Of 127.0.0.1; None: the first free one from 7860 on.
        share: Also at a public address, through gradio's servers.
        ready: Called with the page's address.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks its own server whether it is there
    torch.set_num_threads(1)  # threads of one sample of a tiny network wait for each other
    training = runs.Training(out)
    page = build(places, out, training)
    try:
        _, address, public = page.launch(
            server_name="127.0.0.1", server_port=port, share=share, quiet=True, prevent_thread_lock=True, css=CSS,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]), footer_links=[],
        )  # fmt: skip
        ready(public or address)
        threading.Event().wait()
    finally:
        training.stop()
        page.close(verbose=False)
