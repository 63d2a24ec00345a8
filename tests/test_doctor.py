"""`check` on configs whose faults are known, and the doctor's checks on a run's first batch."""

import csv
import json
import time
from types import SimpleNamespace

import pytest
import torch
from networks import batch, tiny_network

from opensora_perflow import PeRFlow
from opensora_perflow.hosts.encoded_captions import KIND
from opensora_perflow.method.warped import WarpedWindows
from opensora_perflow.tools.check import check_config
from opensora_perflow.tools.cli import main
from opensora_perflow.tools.doctor import estimated
from opensora_perflow.training.examination import Case, examine
from opensora_perflow.training.findings import Finding, as_json, healthy, table
from opensora_perflow.training.run import TrainingRun
from opensora_perflow.training.shards import ShardWriter
from opensora_perflow.training.state import StudentState, write_state


@pytest.fixture
def clips(tmp_path):
    """A CSV of two clips, 20 frames of 192 x 192."""
    table = tmp_path / "clips.csv"
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "num_frames", "height", "width", "aspect_ratio", "fps"])
        writer.writerows([str(tmp_path / name), "a ball", 20, 192, 192, 1.0, 24] for name in ("a.mp4", "b.mp4"))
    return table


def config(tmp_path, clips, **changes):
    settings = {
        "scheduler": {"type": "perflow", "windows": 4},
        "dataset": {"type": "VariableVideoTextDataset", "data_path": str(clips)},
        "bucket_config": {"144p": {17: (1.0, 1)}},
        "model": {"type": "STDiT3-XL/2", "from_pretrained": "hpcai-tech/OpenSora-STDiT-v3"},
        "outputs": str(tmp_path / "outputs"),
        **changes,
    }
    path = tmp_path / "config.py"
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    return path


def failed(findings):
    return {finding.name: finding for finding in findings if finding.passed is False}


def test_a_sound_config_passes(tmp_path, clips):
    assert failed(check_config(config(tmp_path, clips))) == {}


@pytest.mark.parametrize(
    "changes, name, words",
    [
        ({"scheduler": {"type": "perflow", "window": 4}}, "keys", "did you mean windows"),
        ({"scheduler": {"type": "perflow", "windows": [0.0, 0.5, 1.0]}}, "keys", "descend"),
        ({"scheduler": {"type": "rflow"}}, "keys", "'rflow'"),
        ({"bucket_config": {"144p": {51: (1.0, 1)}}}, "buckets", "0 of 2 clips fit; the longest has 20 frames"),
        ({"bucket_config": {"720p": {17: (1.0, 1)}}}, "buckets", "0 of 2 clips fit"),
        ({"bucket_config": {"144p": {20: (1.0, 1)}}}, "buckets", "0 of 2 clips fit"),  # 1.x wants more frames than the bucket's
        ({"dataset": {"type": "VariableVideoTextDataset"}}, "data", "no data_path"),
        ({"dataset": {"data_path": "missing.csv"}}, "data", "missing.csv"),
        ({"model": {"type": "STDiT3-XL/2", "from_pretrained": "./missing.safetensors"}}, "paths", "missing.safetensors"),
        ({"scheduler": {"type": "perflow", "teacher": {"from_pretrained": "./no/teacher.pt"}}}, "keys", "no/teacher.pt"),
        ({"load": "./nothing"}, "keys", "resumes from"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, clips, changes, name, words):
    found = failed(check_config(config(tmp_path, clips, **changes)))
    assert name in found and words in found[name].measured, found
    assert found[name].remedy


def test_captions_without_videos_and_stored_chains_need_no_paths(tmp_path):
    (tmp_path / "captions.csv").write_text("text\na ball\n")
    captions = {"type": "perflow_captions", "data_path": str(tmp_path / "captions.csv")}
    assert failed(check_config(config(tmp_path, None, dataset=captions))) == {}
    assert failed(check_config(config(tmp_path, None, dataset={"type": "perflow_stored"}))) == {}
    (tmp_path / "captions.csv").write_text("path\na.mp4\n")
    assert "no column text" in failed(check_config(config(tmp_path, None, dataset=captions)))["data"].measured


def test_texts_that_were_not_encoded_are_named(tmp_path, clips):
    text = {"type": "perflow_encoded", "folder": str(tmp_path / "text")}
    found = failed(check_config(config(tmp_path, clips, text_encoder=text)))
    assert "encode captions with `opensora-perflow encode CONFIG --out DIR`" in found["texts"].measured
    header = {"text_encoder": {}, "model_max_length": 4, "output_dim": 2}
    ShardWriter(tmp_path / "text", KIND, header, 0, "").write(0, {"y": torch.ones(1)}, {"captions": '["a"]'}, 1)
    assert failed(check_config(config(tmp_path, clips, text_encoder=text))) == {}


def test_a_checkpoint_of_other_windows_is_named(tmp_path, clips):
    folder = tmp_path / "epoch0-global_step8"
    folder.mkdir()
    (folder / "running_states.json").write_text("{}")
    write_state(folder, StudentState([1.0, 0.6, 0.0], None, "linear", "velocity", {"mode": "sync"}))
    settings = {"type": "perflow", "windows": 2, "teacher": {"from_pretrained": "perflow_tiny_teacher"}}
    found = failed(check_config(config(tmp_path, clips, load=str(folder), scheduler=settings)))
    assert list(found) == ["checkpoint's windows"] and "trained [1.0, 0.6, 0.0], config [1.0, 0.5, 0.0]" in str(found)


def test_the_command_line_of_train_py_counts(tmp_path, clips, capsys):
    path = config(tmp_path, clips, dataset={"type": "VariableVideoTextDataset", "data_path": "missing.csv"})
    assert main(["check", str(path)]) == 1
    assert "-> write one" in capsys.readouterr().out
    assert main(["check", str(path), "--json", "--", "--data-path", str(clips)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] and {row["status"] for row in found["checks"]} == {"passed", "skipped"}


def test_a_checkout_that_is_none_is_not_the_configs_fault(tmp_path, clips, capsys):
    assert main(["check", str(config(tmp_path, clips)), "--open-sora", str(tmp_path)]) == 2
    assert "ROOT must be a checkout" in capsys.readouterr().err


def test_a_check_costs_less_than_its_three_seconds(tmp_path, clips):
    """CPU seconds, which no busy machine raises, without the import of torch."""
    path, began = config(tmp_path, clips), time.process_time()
    check_config(path)
    assert time.process_time() - began < 1


def test_a_table_shows_remedies_of_what_failed():
    rows = [Finding("one", True, "1", "1"), Finding("other", False, "2", "1", "mend it"), Finding("third", None, "not here")]
    assert table(rows).splitlines() == [
        "one    passed   1 (expected: 1)",
        "other  failed   2 (expected: 1)",
        "       -> mend it",
        "third  skipped  not here",
        "3 checks, 1 failed",
    ]
    assert not healthy(rows) and [row["status"] for row in as_json(rows)["checks"]] == ["passed", "failed", "skipped"]


# --- the first batch ---


def examined(monkeypatch, network, data=None, begun=lambda run: None, change=lambda args: args, **settings):
    """Findings of a run's first step, by name."""
    found = {}

    def examiner(run, first, model):
        begun(run)
        found.update({finding.name: finding for finding in examine(Case(run, first, model))})

    monkeypatch.setattr(TrainingRun, "examiner", staticmethod(examiner))
    torch.manual_seed(0)
    x, args = batch(network, 4)
    scheduler = PeRFlow(windows=4, guidance=dict(mode="fixed", scale=3.0), **settings)
    scheduler.training_losses(network, x if data is None else data(x), change(args))
    return found


OF_TEACHER = ("sign of the velocity", "time scale", "latents' scale", "channel halves", "teacher and data")
"""Networks of random weights fail one of these, rightly."""


def test_a_wired_run_passes_all_checks_but_that_of_its_random_teacher(monkeypatch):
    found = examined(monkeypatch, tiny_network().train())
    wrong = {name for name, finding in found.items() if finding.passed is False}
    assert wrong <= set(OF_TEACHER), wrong
    assert found["step-0 parity"].passed and found["CFG parity"].passed and found["targets"].passed
    assert found["x_mask"].passed is None  # all frames move


@pytest.mark.parametrize(
    "name, options",
    [
        ("latents", dict(data=lambda x: x[:, :, :1].expand_as(x))),
        ("latents", dict(data=lambda x: x * torch.tensor([1.0, 0.0, 1.0, 1.0]).reshape(4, 1, 1, 1, 1))),
        ("dropout in the teacher", dict(begun=lambda run: run.teacher.network.train())),
        ("text mask", dict(change=lambda args: {**args, "mask": 2 * args["mask"]})),
    ],
)
def test_what_is_wrong_with_a_first_batch_is_named(monkeypatch, name, options):
    found = examined(monkeypatch, tiny_network().train(), **options)
    assert found[name].passed is False and found[name].remedy


def test_a_mask_that_is_repeated_in_place_of_tiled_breaks_guidance(monkeypatch):
    network = tiny_network().train()

    def hook(module, args, kwargs):
        mask = kwargs["mask"].clone()
        mask[1::2, 2:] = 0  # texts of two lengths
        return args, {**kwargs, "mask": mask if len(args[0]) == len(mask) else mask.repeat_interleave(2, dim=0)}

    network.register_forward_pre_hook(hook, with_kwargs=True)
    assert examined(monkeypatch, network)["CFG parity"].passed is False


def test_a_student_that_teaches_itself_is_named(monkeypatch):
    network = tiny_network().train()

    def share(run):
        object.__setattr__(run.teacher, "network", network)

    assert examined(monkeypatch, network, begun=share)["student as teacher"].passed is False


def test_windows_that_are_looked_up_in_bfloat16_are_named(monkeypatch):
    lookup = WarpedWindows.lookup
    monkeypatch.setattr(WarpedWindows, "lookup", lambda self, t: lookup(self, t.bfloat16().double()))
    assert examined(monkeypatch, tiny_network().train())["window lookup"].passed is False


def test_a_network_that_overflows_fp16_is_named_with_its_windows(monkeypatch):
    network = tiny_network().train()
    network.register_forward_hook(lambda module, args, output: (output * 1e6).half().float() / 1e6)
    with pytest.raises(ValueError, match="NaN or infinity"):
        examined(monkeypatch, network)


def counted(peak: float, changes: list[str]) -> str:
    """What `estimate --json` prints, behind what packages say when they are imported."""
    rows = [
        {"bucket": "144p x 1", "batch": 8, "peak": 2**30, "changes": []},
        {"bucket": "144p x 51", "batch": 4, "peak": int(peak * 2**30), "changes": changes},
    ]
    return "a package's words\n" + json.dumps({"gpus": 8, "parts": {"weights": 2**30, "EMA": 2**29}, "buckets": rows})


def test_the_memory_that_is_counted_is_compared_with_the_card(monkeypatch):
    """1.5 GiB stay; the largest bucket decides, and its remedies are the estimator's."""
    found = estimated(counted(22.5, []), "")
    assert found.passed is None and "1.50 GiB stay on each, 22.50 at the peak of a step (144p x 51, batch 4)" in found.measured
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 * 2**30))
    assert estimated(counted(22.5, []), "").passed is True
    found = estimated(counted(30.0, ["batch size 2 (20.0 GiB)"]), "")
    assert found.passed is False and found.remedy == "144p x 51: batch size 2 (20.0 GiB)" and "24.0 GiB" in found.expected


def test_a_training_that_cannot_be_counted_is_no_failure():
    found = estimated("", "Traceback\nopensora-perflow: the config has no model\n")
    assert found.passed is None and found.measured == "not counted: the config has no model"
