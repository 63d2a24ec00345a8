# As perflow_256px.py, with given frames in seven of eight videos.
#   torchrun --nproc_per_node 8 scripts/diffusion/train.py CONFIG --dataset.data-path videos.csv --exp_name i2v

_base_ = ["perflow_256px.py", "perflow_i2v.py"]
