# Stage 2 on a laptop, started from a checkpoint of the tiny stage 1.
#   python -m opensora_perflow.run ../Open-Sora/scripts/train.py configs/opensora/perflow_tiny_stage2.py --data-path clips.csv \
#       --ckpt-path outputs/000-perflow_tiny_stdit3/epoch3-global_step16

_base_ = ["_base_/tiny_train.py", "_base_/stage2.py"]

# There is no original model of this size: the student of stage 1 teaches.
scheduler = dict(teacher=dict(steps_per_window=1, allow_distilled=True))
