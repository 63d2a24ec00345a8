"""Adapters of Open-Sora 2.0's own network as a delta, merged and as other adapters, each loaded by the host's own loaders.

argv: ROOT, FOLDER. Prints {what was loaded: largest difference from what the student answers, in parts of the answer}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

root, folder = map(Path, sys.argv[1:])
import torch  # noqa: E402
from _harness_v2 import TINY_FLUX  # noqa: E402

from opensora_perflow.run import prepare  # noqa: E402

prepare(str(root / "scripts" / "diffusion" / "inference.py"))
from opensora.models.mmdit.model import Flux  # noqa: E402
from opensora.utils.sampling import prepare_ids  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

from opensora_perflow.checkpoints import read_state_dict, write_state_dict  # noqa: E402
from opensora_perflow.tools import delta, merge  # noqa: E402
from opensora_perflow.training.state import StudentState, find_state, write_state  # noqa: E402
from opensora_perflow.training.teacher import fingerprint  # noqa: E402

RANGE = folder.name == "range"
SETTINGS = {name: value for name, value in TINY_FLUX.items() if name != "type"} | {"guidance_embed": RANGE}
BASE = folder / "base.safetensors"


def flux(weights: Path | None) -> torch.nn.Module:
    there = {"device_map": "cpu", "torch_dtype": torch.float32}
    return Flux(**{**SETTINGS, "from_pretrained": None if weights is None else str(weights)}, **there)


@torch.no_grad()
def answer(network: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    inp = prepare_ids(torch.randn(1, 16, 3, 4, 4), torch.randn(1, 8, 32), torch.randn(1, 16))
    inp |= {"cond": torch.randn(1, 12, 68), "guidance": torch.full((1,), 4.0), "timesteps": torch.full((1,), 0.5)}
    return network.eval()(**inp)


torch.manual_seed(0)
base = flux(None)
for parameter in base.parameters():  # no weight at zero, so that no branch is silent
    parameter.data.add_(0.05 * torch.randn_like(parameter))
# Weights for a range of scales are the student's own.
write_state_dict(BASE, {name: value for name, value in base.state_dict().items() if not name.startswith("guidance_in")})
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "linear2", "img_mlp.0"])
config.modules_to_save = ["guidance_in"] if RANGE else None
first, adapted = fingerprint(base), get_peft_model(base, config)
for parameter in adapted.parameters():
    if parameter.requires_grad:
        parameter.data.add_(0.01 * torch.randn_like(parameter))
adapted.save_pretrained(folder / "checkpoint" / "lora")
guidance = {"mode": "range", "scale": [1.0, 8.0]} if RANGE else {"mode": "fixed", "scale": 3.0}
state = StudentState(
    (1.0, 0.5, 0.0), {"formula": "v2.0", "flow_shift": None}, "linear", "velocity", guidance, teacher=first,
    teacher_source="the network as it was built (from base.safetensors)",
)  # fmt: skip
write_state(folder / "checkpoint", state)
student, found = answer(adapted), {}


def compare(name: str, network: torch.nn.Module) -> None:
    found[name] = ((answer(network) - student).abs().max() / student.abs().max()).item()


file = folder / "delta.safetensors"
delta.make(str(folder / "checkpoint"), str(BASE), file)
for out in ("merged", "one/student.safetensors"):
    delta.merge(file, str(BASE), folder / out)
    compare(out, flux(folder / out))
    assert find_state(folder / out)[0] == state
merge.merge(folder / "checkpoint" / "lora", folder / "whole", str(BASE))
compare("opensora-perflow merge", flux(folder / "whole"))
for source in ("checkpoint", "merged"):
    out = folder / f"adapters of {source}"
    delta.make(str(folder / source), str(BASE), out, rank=4)
    compare(out.name, PeftModel.from_pretrained(flux(BASE), str(out / "lora"), is_trainable=False))  # sampling.py:543
    assert find_state(out / "lora")[0] == state
names = {name for name in read_state_dict(folder / "adapters of merged" / "lora" / "adapter_model.safetensors")}
assert names == set(read_state_dict(folder / "checkpoint" / "lora" / "adapter_model.safetensors"))
other = folder / "other.safetensors"
write_state_dict(other, {name: value + 0.01 for name, value in read_state_dict(BASE).items()})
try:
    delta.make(str(folder / "checkpoint"), str(other), folder / "wrong.safetensors")
except ValueError as error:
    found["refused"] = str(error)
print("RESULT", json.dumps({**found, "moved": ((answer(flux(BASE)) - student).abs().max() / student.abs().max()).item()}))
