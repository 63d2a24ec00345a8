# Adapters (LoRA) on a laptop: one network is student and teacher. Needs peft. To resume, add --load and nothing else:
# --load outputs/000-perflow_lora/epoch1-global_step8
#   python -m opensora_perflow.run ../Open-Sora/scripts/train.py configs/opensora/perflow_tiny_lora.py --data-path clips.csv

_base_ = ["_base_/tiny_train.py", "_base_/stage2.py"]

model = dict(
    _delete_=True,
    type="perflow_lora",
    base={{_base_.model}},
    rank=16,  # of each adapter, >= 1
)
scheduler = dict(teacher=dict(steps_per_window=2), guidance=dict(mode="fixed", scale=3.0))
lr = 2e-3  # of adapters, which start at zero
