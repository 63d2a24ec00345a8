# Stage 1 for Open-Sora 1.3: 4 windows, velocity, guidance at sampling time.
#   torchrun --nproc_per_node 8 scripts/train.py configs/opensora/perflow_stage1_v1_3.py --data-path videos.csv

_base_ = ["_base_/runtime.py", "_base_/v1_3.py", "_base_/stage1.py"]

scheduler = dict(cfg_scale=7.5, use_flaw_fix=True)  # as upstream samples 1.3
