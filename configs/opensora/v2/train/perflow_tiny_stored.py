# Training from stored chains on a laptop; clips.csv as for perflow_tiny.py.
#   opensora-perflow store configs/opensora/v2/train/perflow_tiny.py --data-path clips.csv --out store --open-sora ../Open-Sora
#   python -m opensora_perflow.run ../Open-Sora/scripts/diffusion/train.py \
#       configs/opensora/v2/train/perflow_tiny_stored.py --exp_name stored

_base_ = ["perflow_tiny.py"]

custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.stored"], allow_failed_imports=False)

model = dict(perflow=dict(teacher=dict(stored="store")))  # the folder that `store` wrote
dataset = dict(_delete_=True, type="perflow_stored")
t5 = dict(_delete_=True, type="perflow_encoded_t5", folder="store/text")
clip = dict(_delete_=True, type="perflow_encoded_clip", folder="store/text")
cached_video = True
