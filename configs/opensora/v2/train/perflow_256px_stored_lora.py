# As perflow_256px_stored.py, as LoRA: beside the network a GPU holds adapters and activations alone.
#   torchrun --nproc_per_node 8 scripts/diffusion/train.py CONFIG --exp_name stored_lora

_base_ = ["perflow_256px_stored.py", "perflow_lora.py"]

optim = dict(lr=1e-4)
