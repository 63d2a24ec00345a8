# As perflow_768px.py, as LoRA.
#   torchrun --nproc_per_node 8 scripts/diffusion/train.py CONFIG --dataset.data-path videos.csv --exp_name lora_768px

_base_ = ["perflow_768px.py", "perflow_lora.py"]

optim = dict(lr=1e-4)
