# Stage 3 on a laptop, started from a checkpoint of the tiny stage 2.
#   opensora-perflow export outputs/001-perflow_tiny_stdit3/epoch3-global_step16 --out stage2
#   python -m opensora_perflow.run ../Open-Sora/scripts/train.py configs/opensora/perflow_tiny_stage3.py --data-path clips.csv \
#       --ckpt-path stage2

_base_ = ["_base_/tiny_train.py", "_base_/stage3.py"]

scheduler = dict(teacher=dict(steps_per_window=2))
