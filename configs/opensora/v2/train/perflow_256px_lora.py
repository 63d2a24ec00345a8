# A 4-step student of Open-Sora 2.0 at 256px as LoRA: the first choice. --lora_checkpoint goes on from adapters.
#   torchrun --nproc_per_node 8 scripts/diffusion/train.py CONFIG --dataset.data-path videos.csv --exp_name lora
#
# Memory of each GPU, counted: network 24 GB, T5, CLIP and VAE 10 GB, adapters, their AdamW states and average 1 to 5 GB (8 GPUs
# or 1), and activations. Measured on one GPU at 192 x 336 x 129, without text encoders and VAE: 41.2 GiB at a step's peak.

_base_ = ["perflow_256px.py", "perflow_lora.py"]

optim = dict(lr=1e-4)
