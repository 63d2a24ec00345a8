import json
import sys
import weakref

import pytest
import torch
from mmengine import Config

from opensora_perflow.hosts.script import cannot_import, read_host_config, running_config, trained_students
from opensora_perflow.hosts.v1.host import OpenSora
from opensora_perflow.tools import cli
from opensora_perflow.training.recipe import TeacherSettings
from opensora_perflow.training.teacher import check_source


def main(call, **values):
    """Stands for main() of a host script: its config lies in `cfg`."""
    cfg = Config(dict(scheduler=dict(type="perflow"), model=dict(from_pretrained="teacher"), **values))
    return call(), cfg


def source(settings):
    return check_source(settings, OpenSora())


def test_the_calling_scripts_config_is_found():
    found, cfg = main(lambda: running_config())
    assert found is cfg


def test_the_scripts_variables_are_not_kept_alive():
    """Up to Python 3.12 a frame that was asked for them keeps a copy: of the first batch, on the GPU, for the whole run."""
    alive = []

    def main():
        cfg = Config(dict(scheduler=dict(type="perflow")))
        for step in range(2):
            pixels = torch.zeros(1)
            alive.append(weakref.ref(pixels))
            if step == 0:
                running_config()
        return cfg, [one() is not None for one in alive]

    if sys.gettrace() is not None:
        pytest.skip("a debugger or a coverage tool keeps the copy; run without it")
    _, kept = main()
    assert kept == [False, True]


def test_outside_a_script_there_is_none():
    assert running_config() is None
    assert "first step" in source(TeacherSettings())


def test_a_fresh_run_may_copy_the_student():
    assert main(lambda: source(TeacherSettings()), load=None)[0].endswith("(loaded from teacher)")


def test_a_resumed_student_never_becomes_its_own_teacher():
    with pytest.raises(ValueError, match=r'resumes from .*ckpt.*teacher=dict\(from_pretrained="teacher"\)'):
        main(lambda: source(TeacherSettings(allow_distilled=True)), load="outputs/000/ckpt")
    named = TeacherSettings(from_pretrained="elsewhere")
    assert main(lambda: source(named), load="outputs/000/ckpt")[0] == "weights from elsewhere"


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "config.txt").write_text(json.dumps({"scheduler": {"type": "perflow"}}))
    (tmp_path / "epoch0-global_step8" / "model").mkdir(parents=True)
    return tmp_path


def test_checkpoints_of_a_perflow_run_are_recognised(run_folder, tmp_path_factory):
    for path in ("epoch0-global_step8", "epoch0-global_step8/model", "epoch0-global_step8/ema.pt"):
        assert trained_students(run_folder / path)
    other = tmp_path_factory.mktemp("rflow")
    (other / "config.txt").write_text(json.dumps({"scheduler": {"type": "rflow"}}))
    assert not trained_students(other / "epoch0-global_step8")
    assert not trained_students("hpcai-tech/OpenSora-STDiT-v3")


def test_a_later_stage_that_starts_from_no_student_says_so(run_folder, caplog):
    expected = TeacherSettings(allow_distilled=True)
    main(lambda: source(TeacherSettings()), load=None)
    source(TeacherSettings(from_pretrained=str(run_folder / "epoch0-global_step8"), allow_distilled=True))
    assert not caplog.records
    main(lambda: source(expected), load=None)
    source(expected)
    first, second = (record.getMessage() for record in caplog.records)
    assert "the weights 'teacher' are one" in first and "this run's first weights are one" in second


def test_a_distilled_teacher_must_be_meant(run_folder):
    weights = str(run_folder / "epoch0-global_step8")
    with pytest.raises(ValueError, match="allow_distilled=True"):
        source(TeacherSettings(from_pretrained=weights))
    assert source(TeacherSettings(from_pretrained=weights, allow_distilled=True)) == f"weights from {weights}"


@pytest.mark.parametrize("command", ["estimate", "store --out s", "encode --out s", "embed"])
@pytest.mark.parametrize(
    "text, message",
    [(None, "must be a config's file"), ("model = dict(", "is no config, which is a Python file ('(' was never")],
)
def test_a_config_that_is_none_is_said_before_a_missing_open_sora(command, text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "config.py").write_text(text)
    prompt = ["a dog"] if command == "embed" else []
    assert cli.main([*command.split(), "config.py", *prompt, "--open-sora", "no checkout"]) == 2
    assert message in capsys.readouterr().err


def test_what_a_config_raises_is_told_with_its_name(tmp_path):
    (tmp_path / "config.py").write_text("x = 1 / 0")
    with pytest.raises(ValueError, match="config.py' cannot be read .ZeroDivisionError"):
        read_host_config(tmp_path / "config.py", is_v2=False)


@pytest.mark.parametrize("is_v2, section", [(False, "ae"), (True, "scheduler")])
def test_a_config_of_the_other_open_sora_is_told_before_its_imports(is_v2, section, tmp_path):
    imports = "custom_imports = dict(imports=['no_such_module'], allow_failed_imports=False)"
    (tmp_path / "config.py").write_text(f"model = dict(type='flux')\n{section} = dict(type='x')\n{imports}\n")
    here, there = ("2.0", "1.x") if is_v2 else ("1.x", "2.0")
    with pytest.raises(ValueError, match=f"is a config of Open-Sora {there}, and the checkout is Open-Sora {here}"):
        read_host_config(tmp_path / "config.py", is_v2)
    with pytest.raises(ValueError, match="no_such_module"):
        read_host_config(tmp_path / "config.py", not is_v2)


def test_an_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    for command in ("store", "encode"):
        assert cli.main([command, "config.py", "--out", str(tmp_path / "file")]) == 2
        assert "--out must be a folder, got the file" in capsys.readouterr().err


@pytest.mark.parametrize("name, remedy", [("opensora.registry", "name its checkout"), ("omegaconf", "install what is missing")])
def test_what_stops_the_import_of_open_sora_is_told_from_its_absence(name, remedy):
    assert remedy in str(cannot_import(ModuleNotFoundError(f"No module named {name!r}", name=name)))
