"""Delta weights: what comes back is the student, and what does not belong together is one sentence."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from networks import tiny_network
from safetensors.torch import load_file, save_file
from torch import nn

from opensora_perflow.checkpoints import read_metadata, read_state_dict, write_state_dict
from opensora_perflow.hosts.v1.lora import LoRA, add_adapters, record_of
from opensora_perflow.tools.cli import main
from opensora_perflow.training.adapters import adapter_state
from opensora_perflow.training.delta import added, changed, compare, difference, low_rank
from opensora_perflow.training.delta_file import METADATA_KEY, Origin, read_delta, write_delta
from opensora_perflow.training.state import StudentState, find_state, write_state

STATE = StudentState(
    windows=(1.0, 0.5, 0.0), transform=None, path="linear", prediction="velocity", guidance={"mode": "fixed", "scale": 3.0}
)


def spread(seed: int, low: float = -40, high: float = 30) -> torch.Tensor:
    """float32 of any sign, from 2^low to 2^high: every pair of them rounds in some other way."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.empty(200_000).uniform_(low, high, generator=draw).exp2()
    return sizes * torch.randn(200_000, generator=draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_and_delta_are_the_student_to_the_last_bit(dtype):
    """Also where float32 cannot hold the difference, as of 1 and 1e-12."""
    low, high = (-12, 12) if dtype == torch.float16 else (-40, 30)
    pairs = {"any": (spread(0, low, high), spread(1, low, high)), "near": (spread(2, low, high), spread(2, low, high) * 1.001)}
    pairs["zeros"] = (torch.tensor([0.0, 1.0, 0.0, 1e-12, 1.0]), torch.tensor([0.0, 0.0, 3e-38, 1.0, 1e-12]))
    base, student = ({name: pair[i].to(dtype) for name, pair in pairs.items()} for i in (0, 1))
    delta = difference(student, base)
    back = added(base, delta, 1.0, dtype)
    assert all(torch.equal(back[name], student[name]) for name in pairs)
    assert "rest.any" in delta or dtype == torch.float16  # so that the case is met at all


def test_a_small_change_needs_nothing_beside_float32():
    """Numbers within a factor of two have an exact difference (Sterbenz)."""
    base = {"w": spread(0)}
    assert difference({"w": base["w"] * 1.3, "same": base["w"]}, base | {"same": base["w"]}).keys() == {"delta.w"}


def test_merging_counts_the_delta_by_its_scale():
    base, student, tuned = ({"w": torch.tensor(values)} for values in ([1.0, 2.0], [1.5, 1.0], [3.0, 4.0]))
    delta = difference(student, base)
    assert added(tuned, delta, -2.0, torch.float32)["w"].tolist() == [2.0, 6.0]
    found = compare(tuned, base, changed(delta))
    assert (found.base, found.delta, found.drift) == pytest.approx((5**0.5, 1.25**0.5, 8**0.5))
    assert found.cosine == pytest.approx((2 * 0.5 - 2 * 1.0) / (1.25 * 8) ** 0.5)


def test_adapters_of_a_rank_hold_a_delta_of_that_rank():
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 20, generator=draw), torch.randn(10, 3, generator=draw)
    changes = {"a.weight": up @ down, "b.bias": torch.ones(4)}
    layers = {"a": (10, 20), "same": (2, 5)}
    adapters, missed = low_rank(changes, layers, 3)
    product = adapters["a.lora_B.default.weight"] @ adapters["a.lora_A.default.weight"]
    torch.testing.assert_close(product, changes["a.weight"], rtol=1e-4, atol=1e-5)  # float32's singular values
    assert missed == pytest.approx(2 / (changes["a.weight"].square().sum().item() + 4) ** 0.5, rel=1e-4)
    assert adapters["same.lora_A.default.weight"].shape == (3, 5) and not adapters["same.lora_B.default.weight"].any()
    sizes = torch.linalg.svdvals(changes["a.weight"])
    assert low_rank({"a.weight": changes["a.weight"]}, layers, 2)[1] == pytest.approx(
        (sizes[2] / sizes.norm()).item(), rel=1e-4
    )
    assert low_rank(changes, layers, 16)[1] == pytest.approx(missed, rel=1e-4)


def moved(network: nn.Module, seed: int, size: float) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=draw))
    return network


@pytest.fixture
def files(tmp_path):
    """Base, student (a checkpoint folder, with its state), a fine-tune; and what the folder then holds."""
    write_state_dict(tmp_path / "base.safetensors", tiny_network().state_dict())
    write_state_dict(tmp_path / "student" / "model" / "model.safetensors", moved(tiny_network(), 1, 0.01).state_dict())
    write_state(tmp_path / "student", STATE)
    write_state_dict(tmp_path / "tuned.safetensors", moved(tiny_network(), 2, 0.02).state_dict())
    return tmp_path


def made(files):
    assert run("make", files / "student", files / "d.safetensors", "--base", files / "base.safetensors") == 0
    return files / "d.safetensors"


def run(*arguments):
    return main(["delta", *map(str, arguments)])


@pytest.mark.parametrize("out", ["out", "apart/out.pt", "apart/out.pth", "apart/out.safetensors"])
def test_the_student_comes_back_in_every_layout_with_its_windows(files, out, capsys):
    assert run("merge", made(files), files / "base.safetensors", files / out) == 0
    back, student = read_state_dict(files / out), read_state_dict(files / "student")
    assert back.keys() == student.keys() and all(torch.equal(back[name], student[name]) for name in student)
    assert find_state(files / out)[0] == STATE
    assert "these weights are the delta's base" in capsys.readouterr().out


def test_a_student_in_bfloat16_comes_back(files):
    half = {name: value.bfloat16() for name, value in read_state_dict(files / "student").items()}
    write_state_dict(files / "student" / "model" / "model.safetensors", half)
    assert run("merge", made(files), files / "base.safetensors", files / "out", "--dtype", "bfloat16") == 0
    assert all(torch.equal(value, half[name]) for name, value in read_state_dict(files / "out").items())


def test_a_fine_tune_gets_the_delta_after_its_distance_is_told(files, capsys):
    delta, tuned, base = made(files), files / "tuned.safetensors", files / "base.safetensors"
    assert run("merge", delta, tuned, files / "out", "--base", base, "--scale", "0.5") == 0
    said = capsys.readouterr().out
    assert "the fine-tune went across the delta" in said and said.index("cosine") < said.rindex("written to")
    states = [read_state_dict(files / name) for name in ("out", "tuned.safetensors", "student", "base.safetensors")]
    for name in states[0]:
        out, fine, student, start = (state[name] for state in states)
        torch.testing.assert_close(out, fine + 0.5 * (student - start), rtol=1e-5, atol=1e-6)  # float32
    assert run("inspect", delta, "--into", tuned, "--base", base) == 0
    said = capsys.readouterr().out
    assert "windows: 1 0.5 0; guidance {'mode': 'fixed', 'scale': 3.0}; stage 1" in said and "cosine" in said


def test_the_base_in_bfloat16_is_no_fine_tune(files, capsys):
    """Its drift is the way of a student that was rounded too, and moved little else."""
    base = read_state_dict(files / "base.safetensors")
    half = {name: value.bfloat16() for name, value in base.items()}
    write_state_dict(files / "half.safetensors", half)
    half["x_embedder.proj.bias"] = half["x_embedder.proj.bias"] * 1.02
    write_state_dict(files / "student" / "model" / "model.safetensors", half)
    assert run("merge", made(files), files / "half.safetensors", files / "out", "--base", files / "base.safetensors") == 0
    assert "these weights are the delta's base" in capsys.readouterr().out


def test_a_fine_tune_of_a_student_gets_the_next_stage_s_delta(files):
    """Of the same teacher, as stage 2 of the configs: both students say stage 1."""
    write_state_dict(files / "next" / "model" / "model.safetensors", moved(tiny_network(), 3, 0.01).state_dict())
    write_state(files / "next", STATE)
    assert run("merge", made(files), files / "tuned.safetensors", files / "few", "--base", files / "base.safetensors") == 0
    assert run("make", files / "next", files / "e.safetensors", "--base", files / "student") == 0
    assert run("merge", files / "e.safetensors", files / "few", files / "out", "--base", files / "student") == 0
    assert run("merge", files / "e.safetensors", files / "next", files / "twice", "--base", files / "student") == 2


def test_what_a_network_computes_or_begins_with_zero_is_no_difference(files):
    """Weights of 1.2 are the base of students of 1.3, whose embedders of reference frames they lack."""
    student = read_state_dict(files / "student")
    student |= {"pos_embed_temporal": torch.ones(3), "x_embedder_cond.proj.weight": torch.full((2, 2), 0.01)}
    write_state_dict(files / "student" / "model" / "model.safetensors", student)
    assert run("merge", made(files), files / "base.safetensors", files / "out") == 0
    back = read_state_dict(files / "out")
    assert back.keys() == student.keys()  # 1.0 loads a folder with all of its tables alone
    assert all(torch.equal(back[name], student[name]) for name in student)


def adapters(files, folder="lora"):
    pytest.importorskip("peft")
    network = add_adapters(tiny_network(), LoRA(rank=2))
    with torch.no_grad():
        for weight in adapter_state(network).values():
            weight.fill_(0.01)
    write_state_dict(files / folder / "model" / "model.safetensors", network.state_dict())
    write_state(files / folder, replace(STATE, adapters=record_of(network)))
    return files / folder


def test_adapters_are_a_student_too(files):
    base, lora = files / "base.safetensors", adapters(files)
    assert run("make", lora, files / "d.safetensors", "--base", base) == 0
    assert run("merge", files / "d.safetensors", base, files / "out") == 0
    assert main(["merge", str(lora), str(files / "merged"), "--base", str(base), "--no-ema"]) == 0
    ours, theirs = (read_state_dict(files / name) for name in ("out", "merged"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert find_state(files / "out")[0] == STATE


@pytest.mark.parametrize("version", [1, 2])
def test_adapters_are_merged_into_two_files_of_one_folder(files, version):
    base = files / "base.safetensors" if version == 1 else lora_checkpoint(files / "c")
    checkpoint = adapters(files) if version == 1 else files / "c"
    for name in ("student.safetensors", "student.pt"):
        assert main(["merge", str(checkpoint), str(files / "apart" / name), "--base", str(base), "--no-ema"]) == 0


def test_a_delta_becomes_adapters_that_merge_takes(files, capsys):
    base, lora = files / "base.safetensors", adapters(files)
    assert run("make", lora, files / "again", "--base", base, "--rank", "2") == 0
    assert "adapters of rank 2 miss 0.0000" in capsys.readouterr().out  # they had rank 2
    again = add_adapters(tiny_network(), LoRA(rank=2))
    again.load_state_dict(read_state_dict(files / "again"))  # strict
    assert main(["merge", str(files / "again"), str(files / "out"), "--base", str(base), "--no-ema"]) == 0
    assert main(["merge", str(lora), str(files / "merged"), "--base", str(base), "--no-ema"]) == 0
    ours, theirs = (read_state_dict(files / name) for name in ("out", "merged"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)  # float32's singular values


def edit(path, change):
    """Write a file anew, its metadata as they were."""
    metadata, tensors = read_metadata(path), load_file(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def other_windows(metadata, tensors):
    record = json.loads(metadata[METADATA_KEY])
    record["state"] = record["state"].replace("0.5", "0.7")
    metadata[METADATA_KEY] = json.dumps(record)


def newer(metadata, tensors):
    metadata[METADATA_KEY] = json.dumps(json.loads(metadata[METADATA_KEY]) | {"format": 2})


MERGE_FAULTS = {
    "edited value": "checksum is wrong",
    "edited windows": "checksum is wrong",
    "newer format": "has format 2, this version reads 1",
    "no record": "is no delta",
    "truncated": "damaged or incomplete",
    "weights for a delta": "is no delta",
    "no base named": "name the base with --base",
    "other base": "the delta was made from another base than",
    "foreign weights": "is no fine-tune of the delta's base: its weights are 1.",
    "smaller network": "are not of one network:",
    "adapters": "holds adapters .LoRA. alone",
    "delta into delta": "is a delta, and the weights of a whole network are wanted",
    "out exists": "exists; name a file or folder that does not",
    "beside another student": "belongs to other weights",
    "scale": "--scale must be a number other than 0",
    "twice": "student' is a few-step student already .*perflow.json., and a delta goes into",
    "average of the same training": "ema.pt' is a few-step student already .its cosine to the delta is 1.000.",
    "out of another kind": "a file that ends in .pt, .pth, .safetensors, got .*out.bin",
    "adapters of 2.0": "c' holds adapters .LoRA. alone",
    "base beside a base": "the delta was made from another base than .*other",
    "not finite": "holds NaN or infinity",
    "out below a file": "d.safetensors is a file; name an OUT in a folder",
    "beside other weights": "would lie beside base.safetensors, d.safetensors, other.safetensors, and its perflow.json",
    "in another student's model": "student/perflow.json belongs to other weights",
}


@pytest.mark.parametrize("fault", MERGE_FAULTS)
def test_merging_what_does_not_belong_together_writes_nothing(files, fault, capsys):
    delta, base, tuned, out, more = made(files), files / "base.safetensors", files / "tuned.safetensors", files / "out", []
    other = files / "other.safetensors"
    write_state_dict(other, tiny_network(5, hidden_size=16 if fault == "smaller network" else 32).state_dict())
    edits = {
        "edited value": lambda metadata, tensors: next(iter(tensors.values())).flatten()[:1].add_(1e-3),
        "edited windows": other_windows,
        "newer format": newer,
        "no record": lambda metadata, tensors: metadata.pop(METADATA_KEY),
    }
    if fault in edits:
        edit(delta, edits[fault])
    elif fault == "truncated":
        delta.write_bytes(delta.read_bytes()[:-100])
    elif fault == "adapters":
        tuned = adapters(files)
    elif fault == "out exists":
        out.mkdir()
    elif fault == "beside another student":
        write_state(files, replace(STATE, stage=2))
        out = files / "out.pt"
    elif fault == "adapters of 2.0":
        lora_checkpoint(files / "c")
    elif fault == "not finite":
        edit(tuned, lambda metadata, tensors: tensors["x_embedder.proj.bias"].fill_(float("nan")))
    elif fault == "in another student's model":
        write_state(files / "student", replace(STATE, stage=2))
    elif fault == "average of the same training":
        # 1.2 times the student's way from the base
        average = {
            name: value + 1.2 * (read_state_dict(files / "student")[name] - value)
            for name, value in read_state_dict(base).items()
        }
        torch.save(average, files / "ema.pt")
        tuned = files / "ema.pt"
    places = {
        "out below a file": delta / "out",
        "out of another kind": files / "out.bin",
        "beside other weights": files / "out.pt",
    }
    out = {**places, "in another student's model": files / "student" / "model" / "out.pt"}.get(fault, out)
    into = {"foreign weights": other, "smaller network": other, "delta into delta": delta, "twice": files / "student"}
    into |= {"adapters of 2.0": files / "c", "base beside a base": base}
    into = into.get(fault, tuned)
    if fault != "no base named":
        more += ["--base", other if fault in ("other base", "base beside a base") else base]
    if fault == "scale":
        more += ["--scale", "0"]
    before = sorted(path for path in files.rglob("*"))
    capsys.readouterr()
    assert run("merge", other if fault == "weights for a delta" else delta, into, out, *more) == 2
    said = capsys.readouterr()
    assert re.search(MERGE_FAULTS[fault], said.err) and said.err.count("\n") == 1 and not said.out
    assert sorted(path for path in files.rglob("*")) == before


MAKE_FAULTS = {
    "other base": "is no student of .* its weights are 1.",
    "the base itself": "hold the same weights",
    "smaller base": "are not of one network:",
    "adapters as base": "holds adapters .LoRA. alone",
    "not finite": "holds NaN or infinity",
    "suffix": "a delta is a .safetensors file, got",
    "rank 0": "--rank must be >= 1",
    "rank without a state": "adapters are loaded by their perflow.json, and the student has none",
    "changed places": "student' is a student .*perflow.json., and .*base.safetensors' is not known as one; if the two changed",
    "adapters of 2.0 as base": "c' holds adapters .LoRA. alone",
    "base not finite": "base.safetensors' holds NaN or infinity",
    "rank into a file": "adapters are a folder, got the file",
    "out below a file": "base.safetensors is a file; name an OUT in a folder",
}


@pytest.mark.parametrize("fault", MAKE_FAULTS)
def test_making_a_delta_of_what_does_not_belong_together_writes_nothing(files, fault, capsys):
    student, base, out, more = files / "student", files / "base.safetensors", files / "d.safetensors", []
    if fault in ("other base", "smaller base"):
        write_state_dict(base, tiny_network(5, hidden_size=16 if fault == "smaller base" else 32).state_dict())
    elif fault == "the base itself":
        student = base
    elif fault == "adapters as base":
        base = adapters(files)
    elif fault in ("not finite", "base not finite"):
        broken = base if fault == "base not finite" else student / "model" / "model.safetensors"
        edit(broken, lambda metadata, tensors: tensors["x_embedder.proj.bias"].fill_(float("nan")))
    elif fault == "changed places":
        student, base = base, student
    elif fault == "adapters of 2.0 as base":
        lora_checkpoint(files / "c")
        base = files / "c"
    elif fault == "rank into a file":
        more = ["--rank", "2"]
    elif fault == "out below a file":
        out = base / "d.safetensors"
    elif fault == "suffix":
        out = files / "d"
    elif fault == "rank 0":
        more = ["--rank", "0"]
    elif fault == "rank without a state":
        (student / "perflow.json").unlink()
        edit(student / "model" / "model.safetensors", lambda metadata, tensors: metadata.pop("perflow", None))
        out, more = files / "lora", ["--rank", "2"]
    before = sorted(path for path in files.rglob("*"))
    assert run("make", student, out, "--base", base, *more) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "has no perflow.json" not in line]
    assert re.search(MAKE_FAULTS[fault], lines[0]) and len(lines) == 1 and not said.out
    assert sorted(path for path in files.rglob("*")) == before


def test_a_base_without_weights_to_compare_is_refused(files, capsys):
    assert run("inspect", made(files), "--base", files / "base.safetensors") == 2
    assert "there is no --into" in capsys.readouterr().err


def test_a_delta_is_no_base_of_adapters(files, capsys):
    assert main(["merge", str(adapters(files)), str(files / "out"), "--base", str(made(files)), "--no-ema"]) == 2
    assert "is a delta, and the weights of a whole network are wanted here" in capsys.readouterr().err


def test_a_delta_is_never_taken_for_a_student(files):
    assert find_state(made(files)) is None


def test_a_file_keeps_what_was_written(tmp_path):
    delta = {"delta.w": torch.randn(3, 4), "rest.w": torch.tensor([[2.0], [1e-20]], dtype=torch.float64)}
    origin = Origin("ab12", "base", "student", "bfloat16", STATE.to_json())
    write_delta(tmp_path / "d.safetensors", delta, origin)
    found, tensors = read_delta(tmp_path / "d.safetensors")
    assert found == origin and found.student == STATE and all(torch.equal(tensors[name], delta[name]) for name in delta)


def lora_checkpoint(folder, config=None, prefix="base_model.model.", **others):
    """A folder of Open-Sora 2.0's adapters on a network of one layer, and the layer's file."""
    (folder / "lora").mkdir(parents=True)
    added = {"layer.lora_A.weight": torch.full((1, 3), 2.0), "layer.lora_B.weight": torch.ones(2, 1), **others}
    save_file({prefix + name: value for name, value in added.items()}, folder / "lora" / "adapter_model.safetensors")
    text = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 3, **(config or {})})
    (folder / "lora" / "adapter_config.json").write_text(text)
    write_state(folder, replace(STATE, transform={"formula": "v2.0", "flow_shift": None}))
    save_file({"layer.weight": torch.full((2, 3), 100.0), "norm.scale": torch.ones(3)}, folder / "base.safetensors")
    return folder / "base.safetensors"


@pytest.mark.parametrize("named", ["", "lora"])
def test_adapters_of_open_sora_2_are_a_student_too(tmp_path, named):
    """W + 3 / 1 * B A = 100 + 3 * 2, from the checkpoint or its folder lora/; a module that peft saved whole stays."""
    base = lora_checkpoint(tmp_path / "c", **{"norm.scale": torch.full((3,), 5.0)})
    command = ["delta", "make", str(tmp_path / "c" / named), str(tmp_path / "d.safetensors"), "--base", str(base)]
    assert main(command) == 0
    assert main(["delta", "merge", str(tmp_path / "d.safetensors"), str(base), str(tmp_path / "out")]) == 0
    assert main(["merge", str(tmp_path / "c" / named), str(tmp_path / "whole"), "--base", str(base)]) == 0
    for out in ("out", "whole"):
        found = load_file(tmp_path / out / "model" / "model.safetensors")
        assert torch.equal(found["layer.weight"], torch.full((2, 3), 106.0)) and found["norm.scale"].tolist() == [5.0] * 3
        assert find_state(tmp_path / out)[0].transform["formula"] == "v2.0"


def test_an_average_that_is_asked_for_has_to_be_there(tmp_path, capsys):
    """Without --ema, adapters of 2.0 are taken from the last step where nothing else is there."""
    base = lora_checkpoint(tmp_path / "c")
    command = ["merge", str(tmp_path / "c"), str(tmp_path / "out"), "--base", str(base)]
    assert main([*command, "--ema"]) == 2 and "c has no averaged weights beside it" in capsys.readouterr().err
    assert main(command) == 0


def test_a_delta_of_open_sora_2_becomes_its_adapters(tmp_path, capsys):
    base = lora_checkpoint(tmp_path / "c")
    assert main(["delta", "make", str(tmp_path / "c"), str(tmp_path / "out"), "--base", str(base), "--rank", "2"]) == 0
    assert "miss 0.0000 of the delta's norm" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["layer"] and config["r"] == config["lora_alpha"] == 2
    found = load_file(tmp_path / "out" / "lora" / "adapter_model.safetensors")
    product = found["base_model.model.layer.lora_B.weight"] @ found["base_model.model.layer.lora_A.weight"]
    torch.testing.assert_close(product, torch.full((2, 3), 6.0), rtol=1e-6, atol=0)  # float32's singular vectors


@pytest.mark.parametrize(
    "fault, message",
    [
        (dict(config={"use_rslora": True}), "not of a plain LoRA, which alone can be merged"),
        (dict(config={"bias": "all"}), "not of a plain LoRA"),
        (dict(config={"r": 0}), "is no config of peft's LoRA"),
        ({"layer.lora_magnitude_vector": torch.ones(2)}, "no adapters of linear layers alone: layer.lora_magnitude_vector"),
        ({"other.lora_B.weight": torch.ones(2, 1)}, "no adapters of linear layers alone: other.lora_B"),
        (dict(prefix=""), "no adapters of linear layers alone"),
        ({"other.lora_A.weight": torch.ones(1, 3), "other.lora_B.weight": torch.ones(2, 1)}, "belong to another network"),
        ({"norm.scale": torch.ones(5)}, r"norm.scale is [5], and the base has [3]"),
        ({"other.scale": torch.ones(5)}, r"other.scale is [5], and the base has nothing"),
        ("state", "has no perflow.json; put the one of the training beside"),
    ],
)
def test_other_adapters_are_one_sentence(tmp_path, fault, message, capsys):
    base = lora_checkpoint(tmp_path / "c", **({} if fault == "state" else fault))
    if fault == "state":
        (tmp_path / "c" / "perflow.json").unlink()
    for command in (["delta", "make"], ["merge"]):
        out = tmp_path / ("d.safetensors" if command[0] == "delta" else "out")
        assert main([*command, str(tmp_path / "c"), str(out), "--base", str(base)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("opensora-perflow: ") and message in line and not out.exists()
