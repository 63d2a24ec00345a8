# Stage 1 on a laptop.
#   python -m opensora_perflow.run ../Open-Sora/scripts/train.py configs/opensora/perflow_tiny_stage1.py --data-path clips.csv

_base_ = ["_base_/tiny_train.py", "_base_/stage1.py"]

scheduler = dict(teacher=dict(steps_per_window=1))
