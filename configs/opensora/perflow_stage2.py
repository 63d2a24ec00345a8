# Stage 2 for Open-Sora 1.2: guidance folded in, higher resolutions. Started from a checkpoint of stage 1, taught by the
# original model.
#   opensora-perflow export outputs/000-STDiT3-XL-2/epoch0-global_step4000 --out stage1
#   torchrun --nproc_per_node 8 scripts/train.py configs/opensora/perflow_stage2.py --data-path videos.csv \
#       --ckpt-path stage1

_base_ = ["_base_/runtime.py", "_base_/v1_2.py", "_base_/stage2.py"]

scheduler = dict(teacher=dict(from_pretrained="hpcai-tech/OpenSora-STDiT-v3"))
bucket_config = {
    "_delete_": True,
    "240p": {51: (0.3, 8), 102: (0.3, 4)},
    "360p": {1: (0.3, 16), 51: (0.5, 4), 102: (0.5, 2)},
    "480p": {1: (0.3, 8), 51: (0.5, 2), 102: (0.5, 1)},
    "720p": {1: (0.2, 4), 51: (0.3, 1)},
}
lr = 1e-5
