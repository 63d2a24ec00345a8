# Training from stored chains on a laptop.
#   opensora-perflow store configs/opensora/perflow_tiny_data_free.py --data-path captions.csv --out store \
#       --open-sora ../Open-Sora
#   python -m opensora_perflow.run ../Open-Sora/scripts/train.py configs/opensora/perflow_tiny_stored.py

_base_ = ["perflow_tiny_data_free.py"]

custom_imports = dict(
    imports=["opensora_perflow", "opensora_perflow.hosts.tiny", "opensora_perflow.hosts.stored"], allow_failed_imports=False
)

scheduler = dict(teacher=dict(stored="store"))  # the folder that `store` wrote
dataset = dict(_delete_=True, type="perflow_stored")
text_encoder = dict(_delete_=True, type="perflow_encoded", folder="store/text")
vae = dict(_delete_=True, type="perflow_latents", out_channels=4)
load_video_features = True
