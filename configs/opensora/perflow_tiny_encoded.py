# Distillation without data, text encoder and VAE on a laptop, with captions that were encoded once.
#   opensora-perflow encode configs/opensora/perflow_tiny_data_free.py --data-path captions.csv --out text \
#       --open-sora ../Open-Sora
#   python -m opensora_perflow.run ../Open-Sora/scripts/train.py configs/opensora/perflow_tiny_encoded.py \
#       --data-path captions.csv

_base_ = ["perflow_tiny_data_free.py"]

custom_imports = dict(
    imports=[
        "opensora_perflow",
        "opensora_perflow.hosts.tiny",
        "opensora_perflow.hosts.captions",
        "opensora_perflow.hosts.stored",
    ],
    allow_failed_imports=False,
)

dataset = dict(latents="text")  # the folder that `encode` wrote, with the sizes of latents
text_encoder = dict(_delete_=True, type="perflow_encoded", folder="text")
vae = dict(_delete_=True, type="perflow_latents", out_channels=4)
load_video_features = True
