# Distillation without data, T5 and VAE, for Open-Sora 1.2: as perflow_data_free.py, with captions that were encoded once.
#   opensora-perflow encode configs/opensora/perflow_data_free.py --data-path captions.csv --out text
#   torchrun --nproc_per_node 8 scripts/train.py configs/opensora/perflow_encoded.py --data-path captions.csv

_base_ = ["perflow_data_free.py"]

custom_imports = dict(
    imports=["opensora_perflow", "opensora_perflow.hosts.captions", "opensora_perflow.hosts.stored"],
    allow_failed_imports=False,
)

dataset = dict(latents="text")  # the folder that `encode` wrote, with the sizes of latents
text_encoder = dict(_delete_=True, type="perflow_encoded", folder="text")
vae = dict(_delete_=True, type="perflow_latents", out_channels=4)
load_video_features = True
