"""A student of a small network of the host's, as a delta, merged in every layout, and loaded by the host's own loader.

argv: ROOT, version ("1.0" to "1.3"), FOLDER. Prints {OUT: largest difference from the student}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

root, tag, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
sys.path.insert(0, str(root))

import torch  # noqa: E402

from opensora_perflow import portable  # noqa: E402

portable.activate()
from opensora.registry import MODELS  # noqa: E402
from opensora.utils.ckpt_utils import load_checkpoint  # noqa: E402

import opensora_perflow.hosts.tiny  # noqa: E402, F401
from opensora_perflow.checkpoints import write_state_dict  # noqa: E402
from opensora_perflow.hosts.v1.weights import TABLES  # noqa: E402
from opensora_perflow.tools import delta  # noqa: E402
from opensora_perflow.training.state import StudentState, find_state, write_state  # noqa: E402

NAMES = {"1.0": "perflow_tiny_stdit", "1.1": "perflow_tiny_stdit2", "1.2": "perflow_tiny_stdit3", "1.3": "perflow_tiny_stdit3"}
OUTS = ["student", "pt/student.pt", "pth/student.pth"] + ["one/student.safetensors"] * (tag == "1.3")
STATE = StudentState((1.0, 0.5, 0.0), None, "linear", "velocity", {"mode": "fixed", "scale": 3.0})


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    size = {"input_size": (5, 8, 8)} if tag == "1.0" else {"input_size": (None, None, None), "qk_norm": True}
    return MODELS.build(dict(type=NAMES[tag], in_channels=4, caption_channels=32, model_max_length=10, **size))


base, student = network(0), network(0)
with torch.no_grad():
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.add_(0.01 * torch.randn_like(parameter))
published = {name: value for name, value in base.state_dict().items() if name not in TABLES}
write_state_dict(folder / "base.safetensors", published)
torch.save(student.state_dict(), folder / "ema.pt")
write_state(folder, STATE)
delta.make(str(folder / "ema.pt"), str(folder / "base.safetensors"), folder / "delta.safetensors")
found = {}
for name in OUTS:
    delta.merge(folder / "delta.safetensors", str(folder / "base.safetensors"), folder / name)
    loaded = network(7)
    load_checkpoint(loaded, str(folder / name))
    pairs = zip(loaded.state_dict().values(), student.state_dict().values())
    found[name] = max((one.double() - other.double()).abs().max().item() for one, other in pairs)
    assert find_state(folder / name)[0] == STATE
print("RESULT", json.dumps(found))
