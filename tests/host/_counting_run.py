"""`opensora_perflow.run`, which says at the end how many rows each kind of MMDiT evaluated; see test_v2_shipped.py.

    python _counting_run.py SCRIPT [args ...]

Prints "rows: VIDEO of the video model, IMAGE of the image model", which has no reference frames.
"""

from __future__ import annotations

import sys
from collections import Counter

from torch.nn.modules.module import register_module_forward_hook

from opensora_perflow.run import main

rows: Counter[bool] = Counter()


def count(module, args, output):
    """Called before the network's own hooks, which repeat a student's answer."""
    if type(module).__name__ == "MMDiTModel":
        rows[module.config.cond_embed] += len(output)


register_module_forward_hook(count)
main(sys.argv[1:])
print(f"rows: {rows[True]} of the video model, {rows[False]} of the image model")
