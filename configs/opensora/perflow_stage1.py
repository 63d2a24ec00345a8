# Stage 1 for Open-Sora 1.2: 4 windows, velocity, guidance at sampling time.
#   torchrun --nproc_per_node 8 scripts/train.py configs/opensora/perflow_stage1.py --data-path videos.csv

_base_ = ["_base_/runtime.py", "_base_/v1_2.py", "_base_/stage1.py"]
