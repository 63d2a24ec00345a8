# Few-step sampling on a laptop with adapters; --ckpt-path names an export of a checkpoint of perflow_tiny_lora.py.
#   python -m opensora_perflow.run ../Open-Sora/scripts/inference.py configs/opensora/perflow_tiny_lora_inference.py \
#       --ckpt-path student --prompt "a red circle moving right"

_base_ = ["perflow_tiny_inference.py"]

model = dict(_delete_=True, type="perflow_lora", base={{_base_.model}})  # rank, alpha and targets: as trained
