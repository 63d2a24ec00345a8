"""`opensora-perflow install` on small trees with the files that it looks at."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_perflow.hosts import install as module
from opensora_perflow.hosts.install import TAGS, check, find_tag, install, uninstall
from opensora_perflow.tools import cli

REPOSITORY = Path(__file__).resolve().parents[1]
PATCHES = sorted((REPOSITORY / "patches").glob("*.patch"))
CONFIGS = "configs/opensora"
RECORD = f"{CONFIGS}/.perflow_install.json"
INIT = "opensora/schedulers/__init__.py"
PATCHED_TAGS = [tag for tag in TAGS if tag != "2.0"]
SHIPPED = {
    path.relative_to(REPOSITORY / CONFIGS).as_posix()
    for pattern in ("perflow_*.py", "_base_/*.py")
    for path in (REPOSITORY / CONFIGS).glob(pattern)
}


def write_tree(root: Path, tag: str) -> Path:
    """What an Open-Sora checkout has that matters here, importable, with a scheduler of its own."""
    names = ["dpms", "iddpm"] + (["rf"] if tag in ("v1.2.0", "v1.3") else [])
    newest = PATCHED_TAGS
    files = {
        "opensora/__init__.py": "",
        "opensora/registry.py": "from mmengine.registry import Registry\n"
        "SCHEDULERS = Registry('scheduler', scope='opensora', locations=['opensora.schedulers'])\n",
        INIT: "".join(f"from .{name} import {'RFLOW' if name == 'rf' else name.upper()}\n" for name in names),
        "opensora/schedulers/rf.py": "RFLOW = None\n",
        "opensora/schedulers/dpms.py": "DPMS = None\n",
        "opensora/schedulers/iddpm.py": "from opensora.registry import SCHEDULERS\n"
        "@SCHEDULERS.register_module('iddpm')\nclass IDDPM:\n    pass\n",
        "scripts/train.py": "",
        f"{CONFIGS}/train/16x256x256.py": "scheduler = dict(type='iddpm')\n",
        **{TAGS[older]: "" for older in newest[newest.index(tag) :]},
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def snapshot(root: Path) -> dict[str, str | None]:
    """Every path below root: a file's text, a link's target, None for a folder. Git's own folder is left out."""
    return {
        path.relative_to(root).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_text()
        if path.is_file()
        else None
        for path in root.rglob("*")
        if ".git" not in path.relative_to(root).parts
    }


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=root, capture_output=True, text=True, check=True).stdout


@pytest.fixture(params=PATCHED_TAGS)
def tag(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def any_tree(tmp_path: Path, tag: str) -> Path:
    return write_tree(tmp_path / "Open-Sora", tag)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "Open-Sora", "v1.3")


def python(tree: Path, code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(tree), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True, timeout=120)


# The patches


def test_every_tag_has_one_patch() -> None:
    assert [path.stem.rsplit("-", 1)[1] for path in PATCHES] == list(reversed(PATCHED_TAGS))
    assert [path.name[:5] for path in PATCHES] == [f"{number:04d}-" for number in range(1, len(PATCHES) + 1)]
    readme = (REPOSITORY / "patches" / "README.md").read_text()
    assert all(path.name in readme for path in PATCHES)


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_a_patch_inserts_one_line_and_says_why(path: Path) -> None:
    header, body = path.read_text().split("diff --git ", 1)
    lines = body.splitlines()[3:]
    assert [line[0] for line in lines] == ["@", " ", "+", " "]  # nothing removed, one line of context on either side
    assert lines[2].startswith("+import opensora_perflow  #")
    assert re.search(rf"Upstream: hpcaitech/Open-Sora [0-9a-f]{{40}} \(tag {re.escape(path.stem.rsplit('-', 1)[1])}\)", header)
    assert "Why no hook suffices:" in header and "How to drop it:" in header


# What happens to a tree


def test_install_check_uninstall(any_tree: Path, tag: str) -> None:
    before = snapshot(any_tree)
    assert find_tag(any_tree) == tag
    assert not check(any_tree).complete and check(any_tree).record is None

    assert install(any_tree) is True
    status = check(any_tree)
    assert status.complete and status.tag == tag and status.registers
    assert not (status.missing or status.edited or status.outdated or status.conflict)
    assert set(status.record.configs) == SHIPPED
    for name in SHIPPED:
        assert (any_tree / CONFIGS / name).resolve() == REPOSITORY / CONFIGS / name
    inserted = set((any_tree / INIT).read_text().splitlines()) - set(before[INIT].splitlines())
    assert len(inserted) == 1 and inserted.pop().startswith("import opensora_perflow ")

    assert uninstall(any_tree) is True
    assert snapshot(any_tree) == before
    assert uninstall(any_tree) is False


def test_git_status_is_as_before(tree: Path) -> None:
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "upstream")
    (tree / "scripts" / "train.py").write_text("the user's edit\n")
    (tree / "untracked.txt").write_text("")
    before = git(tree, "status", "--porcelain", "--untracked-files=all")
    install(tree)
    changed = set(git(tree, "status", "--porcelain", "--untracked-files=all").splitlines()) - set(before.splitlines())
    assert changed == {f" M {INIT}", f"?? {RECORD}", *(f"?? {CONFIGS}/{name}" for name in SHIPPED)}
    uninstall(tree)
    assert git(tree, "status", "--porcelain", "--untracked-files=all") == before


def test_a_tree_inside_another_repository(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There git would take the patch's paths from the outer repository's top, and do nothing without a word."""
    git(tree.parent, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(tree.parent / ".git"))  # as inside a git hook
    before = snapshot(tree)
    install(tree)
    assert check(tree).complete and "opensora_perflow" in (tree / INIT).read_text()
    uninstall(tree)
    assert snapshot(tree) == before


def test_a_second_install_changes_nothing(tree: Path) -> None:
    for copy in (False, True):
        assert install(tree, copy=copy) is True
        before = {path: path.lstat().st_mtime_ns for path in tree.rglob("*")}
        assert install(tree, copy=copy) is False
        assert {path: path.lstat().st_mtime_ns for path in tree.rglob("*")} == before


def test_copies_and_links_change_over(tree: Path) -> None:
    before = snapshot(tree)
    install(tree, copy=True)
    copies = [tree / CONFIGS / name for name in SHIPPED]
    assert all(path.is_file() and not path.is_symlink() for path in copies)
    assert all(path.read_text() == (REPOSITORY / CONFIGS / path.relative_to(tree / CONFIGS)).read_text() for path in copies)
    assert check(tree).complete and check(tree).record.copied
    assert install(tree) is True
    assert all(path.is_symlink() for path in copies)
    uninstall(tree)
    assert snapshot(tree) == before


def test_the_configs_load_from_the_tree(tree: Path) -> None:
    from mmengine import Config

    for copy in (False, True):
        install(tree, copy=copy)
        for path in (tree / CONFIGS).glob("perflow_*.py"):
            assert Config.fromfile(path, import_custom_modules=False).scheduler.type == "perflow"


# Registration


@pytest.mark.parametrize("first", ["opensora_perflow", "opensora.registry", "opensora.schedulers"])
def test_perflow_is_registered_whoever_is_imported_first(tree: Path, first: str) -> None:
    install(tree)
    build = "from opensora.registry import SCHEDULERS\nprint(*[SCHEDULERS.build({'type': t}) for t in ('perflow', 'iddpm')])"
    result = python(tree, f"import {first}\n{build}")
    assert result.returncode == 0, result.stderr
    assert "opensora_perflow.hosts.v1.scheduler.PeRFlow object" in result.stdout and "iddpm.IDDPM object" in result.stdout


def test_without_the_plugin_the_tree_says_what_to_do(tree: Path) -> None:
    install(tree)
    result = python(tree, "import sys; sys.modules['opensora_perflow'] = None; import opensora.schedulers")
    assert result.returncode == 1
    assert "if it is not installed, install it or delete this line" in result.stderr and "ModuleNotFoundError" in result.stderr


# Refusals


@pytest.mark.parametrize("lacks", ["opensora/schedulers/__init__.py", "opensora/registry.py", CONFIGS])
def test_an_unknown_tree_is_refused(tree: Path, lacks: str) -> None:
    shutil.rmtree(tree / lacks) if (tree / lacks).is_dir() else (tree / lacks).unlink()
    before = snapshot(tree)
    for action in (find_tag, check, install, uninstall):
        with pytest.raises(
            ValueError, match=rf"v1\.0\.0, v1\.1\.0, v1\.2\.0, v1\.3, 2\.0, got .*which has no {re.escape(lacks)}"
        ):
            action(tree)
    assert snapshot(tree) == before


def test_edits_where_the_line_goes_are_refused(any_tree: Path) -> None:
    lines = (any_tree / INIT).read_text().splitlines(keepends=True)
    (any_tree / INIT).write_text("".join([*lines[:-1], "from .mine import MINE\n", lines[-1]]))
    before = snapshot(any_tree)
    for action in (install, uninstall):
        with pytest.raises(ValueError, match=f"{re.escape(INIT)} has edits where perflow is registered"):
            action(any_tree)
    assert INIT in check(any_tree).conflict and not check(any_tree).complete
    assert snapshot(any_tree) == before


def test_edits_around_the_line_are_refused_when_it_is_taken_out(tree: Path) -> None:
    install(tree)
    text = (tree / INIT).read_text()
    (tree / INIT).write_text(text.replace("import opensora_perflow", "import mine\nimport opensora_perflow"))
    before = snapshot(tree)
    with pytest.raises(ValueError, match=f"{re.escape(INIT)} has edits"):
        uninstall(tree)
    assert snapshot(tree) == before


def test_edits_elsewhere_in_the_file_stay(any_tree: Path, tag: str) -> None:
    original = (any_tree / INIT).read_text()
    # In 1.0 and 1.1 the line's neighbours are the whole file, and git wants what begins a file at its beginning.
    early = "import early\n" if tag in ("v1.2.0", "v1.3") else ""
    (any_tree / INIT).write_text(early + original)
    install(any_tree)
    (any_tree / INIT).write_text((any_tree / INIT).read_text() + "import late\n")
    assert check(any_tree).complete
    uninstall(any_tree)
    assert (any_tree / INIT).read_text() == early + original + "import late\n"


@pytest.mark.parametrize("name", ["perflow_stage1.py", "_base_/runtime.py"])
def test_nothing_is_overwritten(tree: Path, name: str) -> None:
    path = tree / CONFIGS / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine\n")
    before = snapshot(tree)
    for copy in (False, True):
        with pytest.raises(ValueError, match=f"{re.escape(f'{CONFIGS}/{name}')} would be overwritten; move it away"):
            install(tree, copy=copy)
    assert snapshot(tree) == before


def test_an_edited_copy_is_kept(tree: Path) -> None:
    install(tree, copy=True)
    edited = tree / CONFIGS / "perflow_stage1.py"
    edited.write_text("lr = 1\n")
    assert check(tree).complete and check(tree).edited == (f"{CONFIGS}/perflow_stage1.py",)
    assert install(tree, copy=True) is False
    before = snapshot(tree)
    with pytest.raises(ValueError, match="nothing was removed, because configs/opensora/perflow_stage1.py was edited"):
        uninstall(tree)
    with pytest.raises(ValueError, match="nothing was installed, because configs/opensora/perflow_stage1.py was edited"):
        install(tree, copy=False)
    assert snapshot(tree) == before
    edited.unlink()
    assert uninstall(tree) is True


def test_no_git_is_a_clear_error(tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = snapshot(tree)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path / "empty"))
        with pytest.raises(ValueError, match="no `git` on PATH; install it"):
            install(tree)
    assert snapshot(tree) == before


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"version": "0"}', '{"version":"0","patch":"","copied":true,"configs":[]}',
        '{"version":"0","patch":"","copied":"yes","configs":{}}', '{"version":0,"patch":"","copied":true,"configs":{}}',
        '{"version":"0","patch":null,"copied":true,"configs":{}}', '{"version":"0","patch":"","copied":NaN,"configs":{}}',
        '{"version":"0","patch":"","copied":true,"configs":{"perflow_a.py":1}}', "[" * 10**5, " " * (2**20 + 1), "\udcff",
        '{"version":"0","patch":"","copied":true,"configs":{"train/16x256x256.py":"sha256 0"}}',
        '{"version":"0","patch":"","copied":true,"configs":{"other/perflow_a.py":"sha256 0"}}',
        '{"version":"0","patch":"--- a/scripts/train.py\\n+++ /dev/null","copied":true,"configs":{}}',
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused(tree: Path, text: str) -> None:
    (tree / RECORD).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"{re.escape(RECORD)} cannot be read .*; it says what was put into this tree"):
        uninstall(tree)


@pytest.mark.parametrize("name", ["../../scripts/train.py", "/etc/hostname"])
def test_a_record_cannot_remove_files_elsewhere(tree: Path, name: str) -> None:
    install(tree)
    record = json.loads((tree / RECORD).read_text())
    record["configs"][name] = module._content(tree / CONFIGS / name)
    (tree / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="leads out of the folder of configs"):
        uninstall(tree)
    assert (tree / "scripts" / "train.py").is_file()


def test_a_record_cannot_remove_files_through_a_link(tree: Path, tmp_path: Path) -> None:
    install(tree, copy=True)
    elsewhere = tmp_path / "elsewhere"
    (tree / CONFIGS / "_base_").rename(elsewhere)
    (tree / CONFIGS / "_base_").symlink_to(elsewhere)
    before = snapshot(elsewhere)
    for act in (uninstall, install, check):
        with pytest.raises(ValueError, match=r"configs/opensora/_base_ is a link to '.*elsewhere', out of the checkout"):
            act(tree)
    assert snapshot(elsewhere) == before
    (tree / CONFIGS / "_base_").unlink()
    uninstall(tree)


def test_an_incomplete_package_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        module.opensora_perflow, "__file__", str(tmp_path / "site-packages" / "opensora_perflow" / "__init__.py")
    )
    with pytest.raises(ValueError, match="has no folder patches in .*; install the package again"):
        module._shipped("patches")


# Failures and repairs


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("fails_at", ["the third config", "the patch"])
def test_a_failure_leaves_nothing(tree: Path, monkeypatch: pytest.MonkeyPatch, copy: bool, fails_at: str) -> None:
    before = snapshot(tree)
    original, calls = getattr(module, "_put" if fails_at == "the third config" else "_git_apply"), []

    def failing(*arguments: object) -> None:
        calls.append(arguments)
        if (len(calls) == 3) if fails_at == "the third config" else ("--check" not in arguments):
            raise OSError("No space left on device")
        original(*arguments)

    monkeypatch.setattr(module, original.__name__, failing)
    with pytest.raises(OSError, match="No space left"):
        install(tree, copy=copy)
    assert snapshot(tree) == before


@pytest.mark.parametrize("killed_at", [0, 1, 4, len(SHIPPED)])
@pytest.mark.parametrize("half", [True, False])
def test_uninstall_finds_what_a_killed_install_left(
    tree: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, half: bool
) -> None:
    """Killed in the middle of a file (the record is the first, then come the configs), or before it takes its place."""
    before, written = snapshot(tree), []

    def replace(part: Path, path: Path) -> None:
        written.append(path)
        if len(written) == killed_at + 1:
            if half:
                os.truncate(part, 10)
            os._exit(9)
        os.rename(part, path)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(module.os, "replace", replace)
        try:
            install(tree, copy=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and snapshot(tree) != before
    assert uninstall(tree) is True
    assert snapshot(tree) == before and uninstall(tree) is False


def test_what_is_missing_is_named_and_repaired(tree: Path, tmp_path: Path) -> None:
    before = snapshot(tree)
    install(tree)
    (tree / CONFIGS / "_base_" / "runtime.py").unlink()
    (tree / INIT).write_text(before[INIT])
    status = check(tree)
    assert not status.complete and not status.registers and status.missing == (f"{CONFIGS}/_base_/runtime.py",)
    assert install(tree) is True and check(tree).complete
    uninstall(tree)
    assert snapshot(tree) == before


def test_a_line_without_a_record_is_taken_over(tree: Path) -> None:
    """As after `git clean -fd`, or the patch applied by hand."""
    before = snapshot(tree)
    install(tree)
    patched = (tree / INIT).read_text()
    shutil.rmtree(tree / CONFIGS / "_base_")
    for path in (tree / CONFIGS).glob("*perflow_*"):
        path.unlink()
    assert check(tree).registers and not check(tree).complete
    assert install(tree) is True and (tree / INIT).read_text() == patched
    uninstall(tree)
    assert snapshot(tree) == before


def test_another_versions_installation_is_replaced(tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It had a config that is gone, another text in one, another line, and stood elsewhere, where nothing is any more."""
    before = snapshot(tree)
    older = tmp_path / "older"
    for name in ("configs", "patches"):
        shutil.copytree(REPOSITORY / name, older / name)
    (older / CONFIGS / "perflow_gone.py").write_text("scheduler = dict(type='perflow')\n")
    (older / CONFIGS / "perflow_stage1.py").write_text("lr = 1\n")
    for path in (older / "patches").glob("*.patch"):
        path.write_text(path.read_text().replace("+import opensora_perflow  #", "+import opensora_perflow  # older:"))
    for copy in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(module, "_shipped", lambda name: older / name)
            install(tree, copy=copy)
            assert "# older:" in (tree / INIT).read_text() and check(tree).complete
        if not copy:
            older.rename(tmp_path / "away")
        assert check(tree).outdated and not check(tree).complete and check(tree).registers
        assert install(tree, copy=copy) is True and check(tree).complete
        assert "# older:" not in (tree / INIT).read_text() and not (tree / CONFIGS / "perflow_gone.py").exists()
        uninstall(tree)
        assert snapshot(tree) == before
        if not copy:
            (tmp_path / "away").rename(older)


def test_a_file_of_the_users_in_our_folder_stays(tree: Path) -> None:
    install(tree)
    mine = tree / CONFIGS / "_base_" / "mine.py"
    mine.write_text("")
    uninstall(tree)
    assert list((tree / CONFIGS / "_base_").iterdir()) == [mine]


# Open-Sora 2.0


@pytest.fixture
def tree_2(tmp_path: Path) -> Path:
    """What a checkout of 2.0 has that matters here."""
    root = tmp_path / "Open-Sora"
    for name in ("train/image.py", "train/stage1.py", "inference/256px.py", "inference/plugins/sp.py"):
        (root / "configs" / "diffusion" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "configs" / "diffusion" / name).write_text("lr = 1\n")
    for name in ("opensora/__init__.py", "opensora/registry.py", "scripts/diffusion/train.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    return root


@pytest.fixture
def shipped_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two configs for 2.0, one of them with a config of the host's as its base, where this package's configs are."""
    folder = tmp_path / "configs" / "opensora" / "v2"
    for name, text in {"train/perflow_a.py": "_base_ = ['image.py']\n", "inference/perflow_b.py": "seed = 1\n"}.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(module, "_shipped", lambda name: tmp_path / name)
    return folder


@pytest.mark.parametrize("copy", [False, True])
def test_2_0_gets_configs_beside_its_own_and_no_patch(tree_2: Path, shipped_2: Path, copy: bool) -> None:
    from mmengine import Config

    before, folder = snapshot(tree_2), tree_2 / "configs" / "diffusion"
    assert find_tag(tree_2) == "2.0" and check(tree_2).missing == (
        "configs/diffusion/inference/perflow_b.py",
        "configs/diffusion/train/perflow_a.py",
    )
    assert install(tree_2, copy=copy) is True and install(tree_2, copy=copy) is False
    assert check(tree_2).complete and check(tree_2).registers is None
    put = {"train/perflow_a.py", "inference/perflow_b.py"}
    assert set(snapshot(folder)) - {name.removeprefix("configs/diffusion/") for name in before} == {
        ".perflow_install.json",
        *put,
    }
    assert Config.fromfile(folder / "train" / "perflow_a.py").lr == 1
    (folder / "train" / "perflow_a.py").unlink()
    assert check(tree_2).missing == ("configs/diffusion/train/perflow_a.py",) and not check(tree_2).complete
    assert uninstall(tree_2) is True and snapshot(tree_2) == before
    assert uninstall(tree_2) is False


def test_2_0_without_its_configs_is_refused(tree_2: Path) -> None:
    shutil.rmtree(tree_2 / "configs" / "diffusion" / "inference")
    with pytest.raises(ValueError, match=r"which has no configs/diffusion/inference; .* \(2\.0 is the main branch\)"):
        check(tree_2)


def test_the_command_says_nothing_of_a_line_in_2_0(tree_2: Path, shipped_2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["install", str(tree_2)]) == 0
    assert cli.main(["install", "--check", str(tree_2)]) == 0
    printed = capsys.readouterr().out
    assert "Open-Sora 2.0" in printed and "linked, 2 of 2" in printed and "registering line" not in printed
    assert cli.main(["install", "--uninstall", str(tree_2)]) == 0


# The command


def test_the_command(tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["install", "--check", str(tree)]) == 1
    assert "Open-Sora v1.3" in (printed := capsys.readouterr().out) and "not (fully) installed" in printed
    assert cli.main(["install", str(tree)]) == 0
    assert "perflow was installed" in capsys.readouterr().out
    assert cli.main(["install", str(tree)]) == 0
    assert "installed already" in capsys.readouterr().out
    assert cli.main(["install", "--check", str(tree)]) == 0
    assert f"linked, {len(SHIPPED)} of {len(SHIPPED)}" in capsys.readouterr().out
    (tree / CONFIGS / "perflow_stage1.py").unlink()
    assert cli.main(["install", "--check", str(tree)]) == 1
    assert re.search("missing +configs/opensora/perflow_stage1.py", capsys.readouterr().out)
    assert cli.main(["install", "--uninstall", str(tree)]) == 0
    assert "taken out" in capsys.readouterr().out
    assert cli.main(["install", "--uninstall", str(tree)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_commands_refusals(tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["install", str(tree / "opensora")]) == 2
    assert "opensora-perflow: ROOT must be a checkout" in capsys.readouterr().err
    (tree / INIT).write_text("")
    assert cli.main(["install", "--check", str(tree)]) == 1
    assert f"{INIT} has edits" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["install", "--check", "--uninstall", str(tree)])

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(tree))

    monkeypatch.setattr(module, "install", refuse)
    assert cli.main(["install", str(tree)]) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_another_imported_tree_is_pointed_out(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "imported_tree", lambda: tmp_path / "site-packages")
    cli.main(["install", str(tree)])
    assert f"imports opensora from {tmp_path / 'site-packages'}, which is another tree" in capsys.readouterr().out
    monkeypatch.setattr(module, "imported_tree", lambda: tree)
    cli.main(["install", str(tree)])
    assert "note" not in capsys.readouterr().out


def test_the_imported_tree_is_found(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tree))
    monkeypatch.delitem(sys.modules, "opensora", raising=False)
    assert module.imported_tree() == tree
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert module.imported_tree() is None


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["install", "--help"])
    text = capsys.readouterr().out
    for expected in (
        "ROOT",
        'type="perflow"',
        "--check",
        "--uninstall",
        "torchrun scripts/train.py configs/opensora/perflow_stage1.py",
    ):
        assert expected in text
