# Stage 2 on a laptop, started from a checkpoint of the tiny stage 1.
#   opensora-perflow export outputs/000-perflow_tiny_stdit3/epoch3-global_step16 --out stage1
#   python -m opensora_perflow.run ../Open-Sora/scripts/train.py configs/opensora/perflow_tiny_stage2.py --data-path clips.csv \
#       --ckpt-path stage1

_base_ = ["_base_/tiny_train.py", "_base_/stage2.py"]

scheduler = dict(
    teacher=dict(from_pretrained="perflow_tiny_teacher", steps_per_window=2), guidance=dict(mode="fixed", scale=3.0)
)
