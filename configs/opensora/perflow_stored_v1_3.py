# Stage 2 from stored chains, for Open-Sora 1.3: no teacher, no T5 and no VAE in memory, and a third of a step's work.
#   opensora-perflow store configs/opensora/perflow_stage2_v1_3.py --data-path videos.csv --out store --chains 20000
#   torchrun --nproc_per_node 8 scripts/train.py configs/opensora/perflow_stored_v1_3.py

_base_ = ["perflow_stage2_v1_3.py"]

custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.stored"], allow_failed_imports=False)

scheduler = dict(teacher=dict(from_pretrained=None, stored="store"))  # the folder that `store` wrote
dataset = dict(_delete_=True, type="perflow_stored")
text_encoder = dict(_delete_=True, type="perflow_encoded", folder="store/text")
vae = dict(_delete_=True, type="perflow_latents", out_channels=16)
load_video_features = True
