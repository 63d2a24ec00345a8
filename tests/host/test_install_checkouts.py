"""The install command on copies of real Open-Sora checkouts: what it changes, and that perflow then needs no custom_imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _harness import REPOSITORY, Clips, losses, run_script

from opensora_perflow.hosts.install import TAGS, check, install, uninstall

pytestmark = pytest.mark.host
CONFIGS = "configs/opensora"
TRAIN_CONFIGS = {"1.2": "opensora-v1-2/train/stage1.py", "1.3": "opensora-v1-3/train/stage1.py"}

# Until the patch is imported this process must not know opensora_perflow, so the portable layer cannot help where xformers
# is missing. The host needs it to import its networks; none is called here.
WITHOUT_XFORMERS = """
import sys, types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
if find_spec("xformers") is None:
    for name in ("xformers", "xformers.ops"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules["xformers"].ops = sys.modules["xformers.ops"]
"""


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout


def status(root: Path) -> str:
    return git(root, "status", "--porcelain", "--untracked-files=all", "--ignored")


@pytest.fixture(scope="module")
def tree(host_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout that may be changed, as a repository."""
    root = tmp_path_factory.mktemp("copy") / "Open-Sora"
    if (host_root / ".git").exists():
        git(host_root, "clone", "--quiet", "--shared", str(host_root), str(root))
        return root
    shutil.copytree(host_root, root)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    git(root, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "-m", "checkout")
    return root


@pytest.fixture(scope="module")
def installed(tree: Path) -> Path:
    install(tree)
    return tree


def python(root: Path, code: str) -> str:
    """Run code with the checkout importable, and this package not imported; returns what it printed."""
    path = os.pathsep.join([str(root), str(REPOSITORY)])
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_XFORMERS + code]
    environment = {**os.environ, "PYTHONPATH": path, **offline}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("copy", [False, True], ids=["links", "copies"])
def test_install_and_undo(tree: Path, host_tag: str, copy: bool) -> None:
    before = status(tree)
    assert install(tree, copy=copy) is True
    found = check(tree)
    assert found.complete and found.tag.removeprefix("v").startswith(host_tag)
    (patch,) = (REPOSITORY / "patches").glob(f"*-{found.tag}.patch")
    git(tree, "apply", "--check", "--reverse", str(patch))
    assert git(tree, "diff", "--numstat") == "1\t0\topensora/schedulers/__init__.py\n"
    assert (tree / CONFIGS / "perflow_stage1.py").is_file() and (tree / CONFIGS / "inference").is_dir()

    after = status(tree)
    assert install(tree, copy=copy) is False and status(tree) == after
    assert uninstall(tree) is True and status(tree) == before
    assert uninstall(tree) is False


def test_a_folder_without_a_repository(host_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "Open-Sora"
    shutil.copytree(host_root, root, ignore=shutil.ignore_patterns(".git", "assets", "docs", "tools", "eval"))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert install(root) and check(root).complete and uninstall(root)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_the_patch_is_of_the_commit_that_it_names(host_root: Path) -> None:
    if not (host_root / ".git").exists():
        pytest.skip("this checkout is not a git repository")
    tag = check(host_root).tag
    assert tag in TAGS
    (patch,) = (REPOSITORY / "patches").glob(f"*-{tag}.patch")
    commit = git(host_root, "rev-parse", "HEAD").strip()
    assert f"Upstream: hpcaitech/Open-Sora {commit} (tag {tag})" in patch.read_text()


def test_the_name_is_registered_without_custom_imports(installed: Path) -> None:
    code = """
assert "opensora_perflow" not in sys.modules
from opensora.registry import SCHEDULERS, build_module
scheduler = build_module(dict(type="perflow"), SCHEDULERS)
print(type(scheduler).__name__, *sorted(SCHEDULERS.module_dict))
"""
    words = python(installed, code).split()
    assert words[0] == "PeRFlow" and {"perflow", "iddpm", "dpm-solver"} <= set(words[1:])


def test_a_config_of_the_hosts_builds_with_its_type_replaced(installed: Path, host_tag: str) -> None:
    if host_tag not in TRAIN_CONFIGS:
        pytest.skip(f"the schedulers of Open-Sora {host_tag} are IDDPM's")
    code = f"""
from mmengine import Config
from opensora.registry import SCHEDULERS, build_module
config = Config.fromfile("configs/{TRAIN_CONFIGS[host_tag]}")
assert config.scheduler.type == "rflow" and "custom_imports" not in config and "opensora_perflow" not in sys.modules
config.scheduler.type = "perflow"
print(build_module(config.scheduler, SCHEDULERS).keys.sample_method)
"""
    assert python(installed, code).split()[-1] == "logit-normal"


def test_a_config_of_the_hosts_trains_with_its_type_replaced(
    installed: Path, host_tag: str, clips: Clips, tmp_path: Path
) -> None:
    """Its network, VAE and text encoder are replaced by tiny ones, which a custom import registers."""
    if host_tag not in TRAIN_CONFIGS:
        pytest.skip(f"the schedulers of Open-Sora {host_tag} are IDDPM's")
    config = tmp_path / "train.py"
    config.write_text(
        f"""_base_ = {str(installed / "configs" / TRAIN_CONFIGS[host_tag])!r}
scheduler = dict(type="perflow")
custom_imports = dict(imports=["opensora_perflow.hosts.tiny"], allow_failed_imports=False)
model = dict(_delete_=True, type="perflow_tiny_stdit3", qk_norm=True, enable_flash_attn=False, enable_layernorm_kernel=False)
vae = dict(_delete_=True, type="perflow_tiny_vae")
text_encoder = dict(_delete_=True, type="perflow_tiny_text")
bucket_config = {{"_delete_": True, "144p": {{17: (1.0, 1)}}}}
num_workers = 0
num_bucket_build_workers = 1
epochs = 1
log_every = 1
"""
    )
    options = ["--data-path", clips.csv, "--outputs", tmp_path / "outputs"]
    printed = run_script(installed, "train.py", config, *options, cwd=tmp_path)
    assert "PeRFlow teacher: a copy of the student's weights" in printed
    assert losses(printed) and np.isfinite(losses(printed)).all()


def test_our_configs_train_from_inside_the_tree(installed: Path, host_tag: str, clips: Clips, tmp_path: Path) -> None:
    if host_tag not in TRAIN_CONFIGS:
        pytest.skip(f"there are no configs for Open-Sora {host_tag}")
    before = status(installed)
    one_clip = tmp_path / "one.csv"
    one_clip.write_text("".join(clips.csv.read_text().splitlines(keepends=True)[:2]))
    options = ["--data-path", one_clip, "--outputs", tmp_path / "outputs"]
    config, log = f"{CONFIGS}/perflow_tiny_stage1.py", tmp_path / "train.log"
    printed = run_script(Path("."), "train.py", config, *options, cwd=installed, log=log)
    assert len(losses(printed)) >= 4 and np.isfinite(losses(printed)).all()
    assert status(installed) == before


def test_everything_can_be_taken_out_in_the_end(installed: Path) -> None:
    uninstall(installed)
    assert status(installed) == ""
