"""A process group for Open-Sora 2.0's inference.py without torchrun.

scripts/diffusion/inference.py:79 calls dist.barrier. The group before it (utils/cai.py, init_inference_environment) is made
only where torchrun's variables are set. Upstream documents torchrun for one GPU as well.
"""

from __future__ import annotations

from opensora_perflow.portable.imports import announce, has_cuda, source_mentions
from opensora_perflow.portable.process_group import provide_world_of_one

NAME = "world_of_one"


def install() -> bool:
    if has_cuda() or not source_mentions("opensora", "utils/cai.py", "def init_inference_environment"):
        return False
    if not provide_world_of_one():
        return False
    announce(NAME, "a script started without torchrun is a world of one, because Open-Sora 2.0's inference waits for its group")
    return True
