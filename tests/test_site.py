"""The documents: every command is parsed, and run by a test or marked as needing a GPU; code blocks and the notebook run."""

import argparse
import ast
import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import av
import matplotlib
import pytest

from opensora_perflow.checkpoints import write_state_dict
from opensora_perflow.hosts.v1 import keys as keys_v1
from opensora_perflow.hosts.v2 import keys as keys_v2
from opensora_perflow.registry import OBJECTIVES, SCHEDULERS, build_module
from opensora_perflow.tools import cli, compare
from opensora_perflow.training import recipe
from opensora_perflow.training.state import METADATA_KEY, StudentState
from opensora_perflow.worlds.model import load_teacher

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "docs"))

import figures  # noqa: E402
import site_hooks  # noqa: E402

PAGES = sorted([*(REPOSITORY / "docs").glob("*.md"), *REPOSITORY.glob("*.md"), REPOSITORY / "patches" / "README.md"])
TESTS = {
    name
    for path in (REPOSITORY / "tests").rglob("*.py")
    for name in (*re.findall(r"^def (test_\w+)", path.read_text(), re.M), path.stem)
}

GPU = "needs GPUs and Open-Sora's weights"
SETUP = "sets up an environment: an installation from registries"
RUN_BY = {
    r"opensora-perflow\b.*":
        "test_every_opensora_perflow_command_is_accepted_as_written",
    r"torchrun .*": GPU,
    r"python scripts/inference\.py .*": GPU,
    r"python -m opensora_perflow\.run scripts/train\.py CONFIGS/perflow_tiny_stored\.py": "test_a_training_from_files_alone",
    r"python -m opensora_perflow\.run \S+/scripts/train\.py configs/opensora/perflow_tiny_lora\.py .*":
        "test_two_processes_train_adapters_alone",
    r"python -m opensora_perflow\.run \S+/scripts/inference\.py configs/opensora/perflow_tiny_lora_inference\.py .*":
        "test_adapters_and_merged_weights_are_sampled_alike",
    r"python -m opensora_perflow\.run \S+/scripts/diffusion/\w+\.py configs/opensora/v2/\w+/perflow_tiny\.py .*":
        "test_a_tiny_student_is_trained_and_sampled_in_four_steps",
    r"python -c .*write_clips\('clips', 8\).*": "test_code_of_the_pages_runs",
    r"pytest\b.*|OMP_NUM_THREADS=1 (OPENSORA_ROOTS=\S+ )?(\S+/python -m )?pytest tests/host": "test_windows",
    r"ruff .*|mkdocs build --strict": "test_the_site_is_built_strictly",
    r"git clone .*|python\S* -m venv .*|\. \S+/activate|(\S+/)?pip install .*": SETUP,
    r"(printf|export|cd|echo|for) .*|done": SETUP,
}  # fmt: skip
"""Form of a command -> the test that runs it, or why none does."""


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def commands(path: Path) -> list[str]:
    """Each command of a page's shell blocks, without comments."""
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.sub(r"\s#\s.*|\s+#.*$", "", line).split(" && ")]
    return [" ".join(part.split()) for part in parts if part.strip()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_command_is_run_by_a_test_or_says_why_not(path):
    for command in commands(path):
        found = [by for form, by in RUN_BY.items() if re.fullmatch(form, command)]
        assert found, f"{command!r} is in no form of RUN_BY"
        assert found[0] in TESTS or found[0] in (GPU, SETUP), found[0]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_every_opensora_perflow_command_is_accepted_as_written(path, monkeypatch):
    """Options and their values; what a command does is tested where the command is."""

    class Accepted(Exception):
        pass

    def parse(parser, arguments):
        original(parser, arguments)
        raise Accepted

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for command in commands(path):
        if command.startswith("opensora-perflow ") and "--help" not in command:
            with pytest.raises(Accepted):
                cli.main(shlex.split(command)[1:])


def test_code_of_the_pages_runs(tmp_path, monkeypatch):
    """The tutorial's sampling of a demo's student in both languages, and the README's clips."""
    monkeypatch.chdir(tmp_path)
    state = StudentState(windows=compare.WINDOWS, transform=None, path="linear", prediction="velocity", guidance={})
    metadata = {"format": "pt", METADATA_KEY: state.to_json()}
    write_state_dict(tmp_path / "perflow_demo" / "student.safetensors", load_teacher().state_dict(), metadata)
    for name in ("tutorial.md", "tutorial_zh.md"):
        (code,) = blocks(REPOSITORY / "docs" / name, "python")
        exec(compile(code, name, "exec"), {})
        with av.open(str(tmp_path / "my_video.mp4")) as container:
            assert len(list(container.decode(video=0))) == 17
        (tmp_path / "my_video.mp4").unlink()
    (command,) = [command for command in commands(REPOSITORY / "README.md") if command.startswith("python -c")]
    exec(shlex.split(command)[2], {})
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 8


@pytest.mark.parametrize("name", ["extending.md", "extending_zh.md"])
def test_the_objective_of_the_page_is_registered_and_takes_its_keys(name):
    code, config = blocks(REPOSITORY / "docs" / name, "python")
    try:
        exec(compile(code, name, "exec"), {})
        namespace = {}
        exec(config, namespace)
        build_module(namespace["scheduler"], SCHEDULERS)
    finally:
        OBJECTIVES.module_dict.pop("my_huber", None)


def test_the_notebook_runs(capsys, monkeypatch):
    """All cells in their order, with the sizes of the first made small."""
    matplotlib.use("Agg")
    monkeypatch.setattr(compare, "REFERENCE", (1,) * 4)
    cells = json.loads((REPOSITORY / "docs" / "demo.ipynb").read_text(encoding="utf-8"))["cells"]
    first, *others = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = [target.id for target in ast.parse(first).body[0].targets[0].elts]
    namespace = dict(zip(names, (2, 2, 3, 2), strict=True))
    for number, code in enumerate(others):
        exec(compile(code, f"cell {number}", "exec"), namespace)
    assert capsys.readouterr().out.count("endpoint error") == 3
    assert len(namespace["history"]) == 2 and namespace["video"].shape[0] == 17


def test_every_key_is_on_the_pages():
    known = {field.name for module in (recipe, keys_v1, keys_v2) for cls in vars(module).values()
             if isinstance(cls, type) and cls.__module__ == module.__name__ and hasattr(cls, "__dataclass_fields__")
             for field in fields(cls) if "kind" in field.metadata}  # fmt: skip
    made = site_hooks.reference()
    assert len(known) > 50
    assert [name for name in known if f"`{name}`" not in made] == []
    for page in ("config.md", "config_zh.md"):
        text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
        assert [name for name in known if not re.search(rf"[`.]{name}[`=.]", text)] == [], page


def test_the_reference_has_defaults_and_docstrings():
    made = site_hooks.reference()
    assert "`edge_mass`, default `0.75`: Share of the times exactly at the window's noisy edge, 0..1." in made
    assert "## Keys, hosts/v2/keys.py" in made


def test_links_and_lists_as_github_reads_them():
    page = "See [a](../benchmarks/README.md#x), [b](method.md), [c](#here), [d](https://e.org).\n- one\n- two\n```\nx\n- y\n```"
    made = site_hooks._spaced_lists(site_hooks._site_links(page, "docs/recipes.md"))
    assert "[a](benchmarks.md#x), [b](method.md), [c](#here), [d](https://e.org).\n\n- one\n- two" in made
    assert "x\n- y" in made


def test_figures_are_drawn(tmp_path):
    figures.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"warp.svg", "path.svg"}
    euler, teacher, student = figures.path(num_paths=1).axes[0].lines[:3]
    assert len(student.get_xdata()) == len(euler.get_xdata()) == 5 and len(teacher.get_xdata()) == 257
    assert student.get_ydata()[-1] == teacher.get_ydata()[-1] != euler.get_ydata()[-1]


def test_the_site_is_built_strictly(tmp_path):
    """Strict: a link to no page or to no heading fails, so does a page that no menu names."""
    build = pytest.importorskip("mkdocs.commands.build", reason="needs mkdocs-material; run `pip install -e '.[docs]'`")
    pytest.importorskip("material", reason="needs mkdocs-material; run `pip install -e '.[docs]'`")
    from mkdocs.config import load_config

    build.build(load_config(str(REPOSITORY / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site")))
    names = {path.name for path in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "index_zh.html", "reference.html", "tutorial_zh.html", "benchmarks.html"} <= names
    assert "TeacherSettings" in (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
