"""docs/hosts.md names tests and files: they exist."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TEXT = (REPOSITORY / "docs" / "hosts.md").read_text()
PYTHON = [path for folder in ("tests", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")]
TESTS = {name for path in PYTHON for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
FILES = {path.stem for path in PYTHON}


def test_every_test_that_the_host_table_names_exists():
    named = set(re.findall(r"\btest_\w+", TEXT))
    assert len(named) > 40
    assert named - TESTS - FILES == set()


def test_every_file_that_the_host_table_names_exists():
    for name in set(re.findall(r"\b(?:tests|benchmarks|patches)/[\w/]+\.(?:py|md)\b", TEXT)):
        assert (REPOSITORY / name).is_file(), name
    for name in set(re.findall(r"\b(?:hosts|portable)/\w+\.py\b", TEXT)):
        assert (REPOSITORY / "opensora_perflow" / name).is_file(), name


@pytest.mark.parametrize("number", range(1, 70))
def test_every_trap_of_the_hosts_is_answered_once(number):
    assert len(re.findall(rf"^\| T{number} \|", TEXT, re.M)) == 1
