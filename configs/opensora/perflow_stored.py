# Stage 2 from stored chains, for Open-Sora 1.2: no teacher, no T5 and no VAE in memory, and a third of a step's work.
# Write the store once, from captions (perflow_data_free.py) or from a table of videos (perflow_stage2.py):
#   opensora-perflow store configs/opensora/perflow_data_free.py --data-path captions.csv --out store --chains 20000
#   torchrun --nproc_per_node 8 scripts/train.py configs/opensora/perflow_stored.py

_base_ = ["_base_/runtime.py", "_base_/v1_2.py", "_base_/stage2.py"]

custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.stored"], allow_failed_imports=False)

scheduler = dict(teacher=dict(stored="store"))  # the folder that `store` wrote
dataset = dict(_delete_=True, type="perflow_stored")
text_encoder = dict(_delete_=True, type="perflow_encoded", folder="store/text")
vae = dict(_delete_=True, type="perflow_latents", out_channels=4)
load_video_features = True
