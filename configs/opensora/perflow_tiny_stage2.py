# Stage 2 on a laptop.
#   python -m opensora_perflow.run ../Open-Sora/scripts/train.py configs/opensora/perflow_tiny_stage2.py --data-path clips.csv

_base_ = ["_base_/tiny_train.py", "_base_/stage2.py"]

scheduler = dict(teacher=dict(steps_per_window=2))
