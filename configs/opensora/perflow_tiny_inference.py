# Few-step sampling on a laptop; --ckpt-path names an export of any tiny stage.
#   python -m opensora_perflow.run ../Open-Sora/scripts/inference.py configs/opensora/perflow_tiny_inference.py \
#       --ckpt-path student --prompt "a red circle moving right"
# --loop 3 writes 68 frames. A clip shares its last 17 frames with the next clip, so that clips of a loop have 34 frames.

import sys

_base_ = ["_base_/sample.py", "_base_/tiny.py"]

custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.tiny"], allow_failed_imports=False)

num_frames = 34 if any(word.startswith("--loop") for word in sys.argv) else 17  # the teacher was trained on 17
image_size = (192, 192)
aes = None  # the teacher knows no aesthetic scores
save_fps = 8
dtype = "fp32"
scheduler = dict(cfg_scale=3.0)
