# Stage 3 for Open-Sora 1.2: from 4 windows to 2, started from a checkpoint of stage 2.
#   opensora-perflow export outputs/001-STDiT3-XL-2/epoch0-global_step4000 --out stage2
#   torchrun --nproc_per_node 8 scripts/train.py configs/opensora/perflow_stage3.py --data-path videos.csv \
#       --ckpt-path stage2

_base_ = ["_base_/runtime.py", "_base_/v1_2.py", "_base_/stage3.py"]

lr = 1e-5
