# As perflow_tiny.py, as LoRA.

_base_ = ["perflow_tiny.py", "perflow_lora.py"]

lora_config = dict(r=4, lora_alpha=8)
