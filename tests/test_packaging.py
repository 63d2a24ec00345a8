"""The source distribution and the wheel: what is in them, and that an installed wheel works away from the clone."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from test_install import write_tree

REPOSITORY = Path(__file__).resolve().parents[1]
NOT_SHIPPED = shutil.ignore_patterns(
    ".*_cache", ".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", "outputs", "samples", "site", "perflow_demo"
)


def call(*command, cwd, **environment):
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def backend(folder, out, what):
    code = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
    call(sys.executable, "-c", code, str(out), cwd=folder)
    return max(out.iterdir(), key=os.path.getmtime)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The unpacked source distribution, the wheel built from it, and where the wheel is installed."""
    pytest.importorskip("setuptools.command.bdist_wheel", reason="needs setuptools >= 70.1; run `pip install -U setuptools`")
    folder = tmp_path_factory.mktemp("packaging")
    clone = shutil.copytree(REPOSITORY, folder / "clone", ignore=NOT_SHIPPED)
    out = folder / "dist"
    out.mkdir()
    with tarfile.open(backend(clone, out, "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    wheel = backend(source, out, "wheel")
    installed = folder / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    return source, wheel, installed


def test_the_wheel_holds_the_package_its_configs_patches_and_weights(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    wanted = {f"opensora_perflow/{path.relative_to(REPOSITORY).as_posix()}"
              for folder, pattern in (("configs", "*.py"), ("patches", "*.patch"))
              for path in (REPOSITORY / folder).rglob(pattern)}  # fmt: skip
    package = REPOSITORY / "opensora_perflow"
    wanted |= {path.relative_to(REPOSITORY).as_posix() for path in package.rglob("*")
               if path.is_file() and path.suffix != ".pyc"}  # fmt: skip
    assert "opensora_perflow/py.typed" in wanted and "opensora_perflow/worlds/weights/teacher.safetensors" in wanted
    assert wanted - names == set()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"opensora_perflow"}


def test_the_metadata_say_who_where_and_which_torch(built):
    (path,) = built[2].glob("*.dist-info/METADATA")
    metadata = message_from_string(path.read_text())
    assert metadata["Author"] and "github.com/hpcaitech/Open-Sora" in str(metadata.get_all("Project-URL"))
    (torch,) = [line for line in metadata.get_all("Requires-Dist") if line.split(">")[0].split("<")[0] == "torch"]
    assert torch.removeprefix("torch").replace(" ", "") in ("<2.14,>=2.2", ">=2.2,<2.14")


def test_the_installed_package_works_away_from_the_clone(built, tmp_path):
    environment = {"PYTHONPATH": str(built[2]), "PYTHONSAFEPATH": "1"}
    where = call(sys.executable, "-c", "import opensora_perflow as p; print(p.__file__)", cwd=tmp_path, **environment)
    assert Path(where.strip()).is_relative_to(built[2])
    assert "--videos" in call(sys.executable, "-m", "opensora_perflow", "demo", "--help", cwd=tmp_path, **environment)
    root = write_tree(tmp_path / "Open-Sora", "v1.2.0")
    call(sys.executable, "-m", "opensora_perflow", "install", str(root), cwd=tmp_path, **environment)
    link = root / "configs" / "opensora" / "perflow_stage1.py"
    assert link.is_file() and link.resolve().is_relative_to(built[2])


def test_the_tests_in_the_source_distribution_test_the_installed_package(built):
    source, _, installed = built
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_windows.py"]
    shutil.rmtree(source / "opensora_perflow")
    assert " passed" in call(*command, cwd=source, PYTHONPATH=str(installed), PYTHONSAFEPATH="1")
