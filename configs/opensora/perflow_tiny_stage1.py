# Stage 1 on a laptop. To resume: --load outputs/000-perflow_tiny_stdit3/epoch1-global_step8
#   python -m opensora_perflow.run ../Open-Sora/scripts/train.py configs/opensora/perflow_tiny_stage1.py --data-path clips.csv

_base_ = ["_base_/tiny_train.py", "_base_/stage1.py"]

scheduler = dict(teacher=dict(from_pretrained="perflow_tiny_teacher", steps_per_window=2), cfg_scale=3.0)
