# As perflow_768px_lora.py, with given frames in seven of eight videos.
#   torchrun --nproc_per_node 8 scripts/diffusion/train.py CONFIG --dataset.data-path videos.csv --exp_name i2v_lora_768px

_base_ = ["perflow_768px_lora.py", "perflow_i2v.py"]
