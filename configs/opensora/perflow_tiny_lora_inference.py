# Few-step sampling on a laptop with adapters; --ckpt-path names a checkpoint of perflow_tiny_lora.py, or the ema.pt in it.
#   python -m opensora_perflow.run ../Open-Sora/scripts/inference.py configs/opensora/perflow_tiny_lora_inference.py \
#       --ckpt-path outputs/000-perflow_lora/epoch3-global_step16 --prompt "a red circle moving right"

_base_ = ["perflow_tiny_inference.py"]

model = dict(_delete_=True, type="perflow_lora", base={{_base_.model}})  # rank, alpha and targets: as trained
