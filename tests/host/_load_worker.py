"""Loads a checkpoint folder by Open-Sora's own load_checkpoint into its own class; prints what differs from the file.

    python _load_worker.py ROOT FOLDER TYPE

TYPE: the name of a tiny network. The host's factories fix its size, and load by the same function.
"""

from __future__ import annotations

import sys

import torch


def main() -> None:
    root, folder, kind = sys.argv[1:]
    sys.path.insert(0, root)
    from opensora_perflow import portable

    portable.activate()
    from opensora.registry import MODELS, build_module
    from opensora.utils.ckpt_utils import load_checkpoint

    import opensora_perflow.hosts.tiny  # noqa: F401 -- registers TYPE
    from opensora_perflow.checkpoints import read_state_dict

    torch.manual_seed(1)
    sizes = {"input_size": (5, 8, 8), "in_channels": 4, "caption_channels": 32, "model_max_length": 10}
    options = {} if kind.endswith("stdit") else {"qk_norm": True, "enable_flash_attn": False, "enable_layernorm_kernel": False}
    network = build_module({"type": kind, **sizes, **options}, MODELS)
    load_checkpoint(network, folder, save_as_pt=False)
    loaded, written = network.state_dict(), read_state_dict(folder)
    different = [name for name, value in loaded.items() if name not in written or not torch.equal(value, written[name])]
    print(f"loaded {len(loaded)} of {len(written)} tensors, different: {different}")


if __name__ == "__main__":
    main()
