"""The default device of the host's GaussianDiffusion, "cuda".

schedulers/iddpm/gaussian_diffusion.py (v1.1.0:167, v1.2.0:173, v1.3:173): the iddpm scheduler is built without a device
argument. On a CPU only the default can be changed; the code below it is right for any device.
"""

from __future__ import annotations

from types import ModuleType

from opensora_perflow.portable.imports import announce, has_cuda, source_mentions, when_imported

NAME = "device_default"


def _change_default(module: ModuleType) -> None:
    init = module.GaussianDiffusion.__init__
    if (init.__kwdefaults__ or {}).get("device") == "cuda":
        init.__kwdefaults__["device"] = "cpu"
    elif init.__defaults__ and "cuda" in init.__defaults__:
        init.__defaults__ = tuple("cpu" if value == "cuda" else value for value in init.__defaults__)


def install() -> bool:
    source = "schedulers/iddpm/gaussian_diffusion.py"
    if has_cuda() or not source_mentions("opensora", source, '= "cuda"'):
        return False
    when_imported("opensora.schedulers.iddpm.gaussian_diffusion", _change_default)
    announce(NAME, "GaussianDiffusion's default device is cpu, because this machine has no CUDA device")
    return True
