# Distillation without data on a laptop; captions.csv needs a column `text`.
#   python -m opensora_perflow.run ../Open-Sora/scripts/train.py configs/opensora/perflow_tiny_data_free.py \
#       --data-path captions.csv

_base_ = ["_base_/tiny_train.py", "_base_/stage2.py"]

custom_imports = dict(
    imports=["opensora_perflow", "opensora_perflow.hosts.tiny", "opensora_perflow.hosts.captions"], allow_failed_imports=False
)

scheduler = dict(
    teacher=dict(from_pretrained="perflow_tiny_teacher", steps_per_window=2),
    draws=dict(starts="student"),
    guidance=dict(mode="fixed", scale=3.0),
)
dataset = dict(_delete_=True, type="perflow_captions", num_frames=18, image_size=(192, 192))
