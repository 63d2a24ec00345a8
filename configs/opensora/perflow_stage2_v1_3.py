# Stage 2 for Open-Sora 1.3: guidance folded in, higher resolutions. Started from a checkpoint of stage 1, taught by the
# original model.
#   opensora-perflow export outputs/000-STDiT3-XL-2/epoch0-global_step4000 --out stage1
#   torchrun --nproc_per_node 8 scripts/train.py configs/opensora/perflow_stage2_v1_3.py --data-path videos.csv \
#       --ckpt-path stage1

_base_ = ["_base_/runtime.py", "_base_/v1_3.py", "_base_/stage2.py"]

scheduler = dict(
    teacher=dict(from_pretrained="hpcai-tech/OpenSora-STDiT-v4"),
    guidance=dict(mode="fixed", scale=7.5),
    use_flaw_fix=True,  # as upstream samples 1.3: the teacher's guided prediction keeps the deviation of the plain one
)
bucket_config = {
    "_delete_": True,
    "360p": {1: (0.5, 16), 49: (0.5, 2), 97: (0.5, 1)},
    "720p": {1: (0.5, 4), 49: (1.0, 1)},
}
lr = 1e-5
