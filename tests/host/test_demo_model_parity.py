"""TinySTDiT against the real STDiT3: same file, same inputs, same outputs.

The real class runs in a process of its own for each checkout, because every checkout is a package named `opensora`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _harness import SKIP_REASON, host_roots
from safetensors.torch import load_file, save_file

from opensora_perflow.worlds.model import WEIGHTS, TinySTDiT

pytestmark = pytest.mark.host

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = host_roots()

HOST_PROCESS = """
import sys, torch
from safetensors.torch import load_file
root, folder = sys.argv[1:]
sys.path.insert(0, root)
from opensora_perflow import portable
portable.activate()
from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config
job = torch.load(folder + "/job.pt", weights_only=False)
model = STDiT3(STDiT3Config(**job["config"], enable_flash_attn=False, enable_layernorm_kernel=False)).eval()
outputs = {}
for name, path in job["weights"].items():
    state = {key: value.float() for key, value in load_file(path).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    outputs[name, "missing"], outputs[name, "unexpected"] = list(missing), list(unexpected)
    with torch.no_grad():
        for case, arguments in job["cases"].items():
            outputs[name, case] = model(**arguments)
torch.save(outputs, folder + "/outputs.pt")
"""


def input_cases() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def arguments(batch: int, frames: int, rows: int, columns: int) -> dict[str, torch.Tensor]:
        return {
            "x": torch.randn(batch, 4, frames, rows, columns, generator=generator),
            "timestep": 1000 * torch.rand(batch, generator=generator),
            "y": torch.randn(batch, 1, 10, 32, generator=generator),
            "fps": torch.full((batch,), 8.0),
            "height": torch.full((batch,), 8.0 * rows),
            "width": torch.full((batch,), 8.0 * columns),
        }

    mask = torch.tensor([[1] * 6 + [0] * 4, [1] * 3 + [0] * 7, [1] * 10])
    x_mask = torch.ones(3, 5, dtype=torch.bool)
    x_mask[0, :2] = x_mask[2, 4] = False
    doubled = arguments(6, 5, 8, 8)
    for name in ("fps", "height", "width"):  # the host's samplers double x, timestep and y, and leave these
        doubled[name] = doubled[name][:3]
    return {
        "no text mask": arguments(3, 5, 8, 8),
        "text mask": {**arguments(3, 5, 8, 8), "mask": mask},
        "given frames": {**arguments(3, 5, 8, 8), "mask": mask, "x_mask": x_mask},
        "guided batch, mask tiled": {**doubled, "mask": mask, "x_mask": x_mask.repeat(2, 1)},
        "odd sides, image": {**arguments(2, 1, 7, 11), "mask": mask[:2]},
        "longer and larger": {**arguments(1, 10, 24, 16), "mask": mask[:1]},
        "ends of time": {**arguments(2, 5, 8, 8), "timestep": torch.tensor([0.0, 1000.0]), "mask": mask[:2]},
    }


@pytest.fixture(scope="module", params=ROOTS or [None], ids=lambda root: root.name if root else "no-checkout")
def host_outputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(outputs of the real class, weight files, cases) for one checkout."""
    root = request.param
    if root is None:
        pytest.skip(SKIP_REASON)
    if not (root / "opensora" / "models" / "stdit" / "stdit3.py").is_file():
        pytest.skip(f"{root.name} has no STDiT3")
    folder = tmp_path_factory.mktemp("parity")
    torch.manual_seed(0)
    noisy = TinySTDiT()
    with torch.no_grad():  # no weight at zero, so that no branch of either network is silent
        for name, parameter in noisy.named_parameters():
            if name != "rope.freqs":
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(noisy.state_dict(), folder / "random.safetensors")
    weights = {"shipped": str(WEIGHTS), "random": str(folder / "random.safetensors")}
    cases = input_cases()
    torch.save({"config": noisy.config, "weights": weights, "cases": cases}, folder / "job.pt")
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", HOST_PROCESS, str(root), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "outputs.pt", weights_only=False), weights, cases


@pytest.mark.parametrize("weights_name", ["shipped", "random"])
def test_state_dict_has_the_hosts_keys(host_outputs, weights_name: str) -> None:
    outputs, _, _ = host_outputs
    assert outputs[weights_name, "unexpected"] == []
    # v1.3 adds the embedders of reference frames, which start at zero there and are not used without mask_index
    assert all(key.startswith("x_embedder_cond") for key in outputs[weights_name, "missing"])


@pytest.mark.parametrize("weights_name", ["shipped", "random"])
@pytest.mark.parametrize("case", list(input_cases()))
def test_outputs_equal_the_hosts(host_outputs, weights_name: str, case: str) -> None:
    outputs, weights, cases = host_outputs
    model = TinySTDiT().eval()
    model.load_state_dict(load_file(weights[weights_name]))
    with torch.no_grad():
        ours = model(**cases[case])
    theirs = outputs[weights_name, case]
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float32
    # 1e-5 of the output's scale: float32 rounding of a hundred-odd operations, far below any difference in meaning
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
