"""Drives Open-Sora's gradio/app.py without gradio, a browser or CUDA; see test_callers.py.

    python _gradio_worker.py ROOT WEIGHTS OUT.json

In the folder that it is started in, configs/ holds a file at each path that the app reads its config from. The app itself is
not changed: its imports of gradio and spaces meet stand-ins, `.cuda()` of a module stays where it is, and its own table of
weights (HF_STDIT_MAP) names WEIGHTS, a checkpoint's model/. OUT.json gets one entry for each call of `PeRFlow.sample`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

PROMPT = "a red circle moving right"
VIDEO_1_1 = {"mode": "Text2Video", "prompt_text": PROMPT, "resolution": "144p", "aspect_ratio": "1:1", "seed": 42}
VIDEO = {
    **VIDEO_1_1,
    "motion_strength": 5,
    "aesthetic_score": 6.5,
    "use_motion_strength": False,
    "use_aesthetic_score": False,
    "camera_motion": "none",
    "refine_prompt": False,
    "fps": 8,
    "num_loop": 1,
}
FIRST, SECOND = {"sampling_steps": 4, "cfg_scale": 7.0}, {"sampling_steps": 6, "cfg_scale": 1.0}
"""What the user moves the two sliders to."""


def stand_ins() -> dict[str, ModuleType]:
    """Modules of the browser's side: the app uses spaces.GPU as a decorator, and gradio in main() and for warnings."""
    gradio, spaces, flash = ModuleType("gradio"), ModuleType("spaces"), ModuleType("flash_attn")
    spaces.GPU = lambda duration: lambda function: function
    return {"gradio": gradio, "spaces": spaces, "flash_attn": flash}  # without the last, v1.1's app would pip install it


def register_text_encoder() -> None:
    """The tiny text encoder with the attribute that the app moves to its device: T5's network."""
    from opensora.registry import MODELS

    from opensora_perflow.hosts.tiny import HostTextEncoder

    @MODELS.register_module("perflow_tiny_text_t5")
    class WithT5(HostTextEncoder):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.t5 = SimpleNamespace(model=nn.Identity())


def load_app(root: Path, weights: str) -> ModuleType:
    """gradio/app.py, executed as a module: everything but its main()."""
    spec = spec_from_file_location("app", root / "gradio" / "app.py")
    app = module_from_spec(spec)
    # v1.1 and v1.2 load the weights while they are imported, from an id: a folder of that name is found first.
    for name in ("OpenSora-STDiT-v2-stage2", "OpenSora-STDiT-v2-stage3", "OpenSora-STDiT-v3"):
        Path("hpcai-tech").mkdir(exist_ok=True)
        os.symlink(weights, Path("hpcai-tech") / name)
    spec.loader.exec_module(app)
    if "t2v" in app.HF_STDIT_MAP:  # v1.3 loads them in each call, from a folder of its author's
        app.HF_STDIT_MAP = {"t2v": {"144p": weights}, "i2v": weights}
    app.device = torch.device("cpu")
    return app


def record_samples(calls: list[dict[str, Any]]) -> Any:
    """A patch of PeRFlow.sample that notes what each call was and how often it asked the network."""
    from opensora_perflow import PeRFlow

    sample = PeRFlow.sample

    def noted(self: Any, model: nn.Module, *arguments: Any, **options: Any) -> torch.Tensor:
        batches: list[int] = []
        hook = model.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
        samples = sample(self, model, *arguments, **options)
        hook.remove()
        calls.append(
            {
                "scheduler": id(self),
                "steps": self.keys.steps_over(self.windows),
                "cfg_scale": self.keys.cfg_scale,
                "batches": batches,
                "inference_mode": torch.is_inference_mode_enabled(),
                "mask_index": options.get("mask_index"),
                "finite": bool(torch.isfinite(samples).all()),
            }
        )
        return samples

    return mock.patch.object(PeRFlow, "sample", noted)


def main() -> None:
    root, weights, out = Path(sys.argv[1]), str(Path(sys.argv[2]).resolve()), Path(sys.argv[3])
    sys.path[:0] = [str(root / "gradio"), str(root)]
    from opensora_perflow import portable
    from opensora_perflow.run import register_with_host

    portable.activate()
    register_with_host()
    register_text_encoder()
    sys.argv = ["app.py", "--output", str(out.parent / "samples")]
    calls: list[dict[str, Any]] = []
    refuse = mock.Mock(side_effect=RuntimeError("the app tried to start a program"))
    patches = [
        mock.patch.dict(sys.modules, stand_ins()),
        mock.patch.object(nn.Module, "cuda", lambda module, device=None: module),
        mock.patch.object(subprocess, "run", refuse),
    ]
    for patch in patches:
        patch.start()
    app = load_app(root, weights)
    is_1_1 = not hasattr(app, "WATERMARK_PATH")
    video = {**VIDEO_1_1, "length": "2s"} if is_1_1 else {**VIDEO, "length": 17}
    picture = np.zeros((192, 192, 3), dtype=np.uint8)
    picture[64:128, 64:128, 0] = 220
    with record_samples(calls):
        files = [app.run_inference(**video, reference_image=None, **sliders) for sliders in (FIRST, SECOND)]
        files.append(app.run_inference(**video, reference_image=picture, **FIRST))
        files.append(app.run_inference(**{**video, "mode": "Text2Image"}, reference_image=None, **FIRST))
    for call, file in zip(calls, files, strict=True):
        call["file"] = file
    out.write_text(json.dumps(calls, indent=1))


if __name__ == "__main__":
    main()
