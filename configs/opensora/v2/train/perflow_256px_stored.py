# As perflow_256px.py from stored chains: no teacher, no T5, CLIP and VAE in memory, and no path to solve.
# Write the store once. Its table has the columns text, num_frames, height, width and fps; no video is opened.
#   opensora-perflow store configs/diffusion/train/perflow_256px.py --data-path videos.csv --out store --chains 20000
#   torchrun --nproc_per_node 8 scripts/diffusion/train.py CONFIG --exp_name stored

_base_ = ["perflow_256px.py"]

custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.stored"], allow_failed_imports=False)

model = dict(perflow=dict(teacher=dict(stored="store")))  # the folder that `store` wrote
dataset = dict(_delete_=True, type="perflow_stored")
t5 = dict(_delete_=True, type="perflow_encoded_t5", folder="store/text")
clip = dict(_delete_=True, type="perflow_encoded_clip", folder="store/text")
cached_video = True  # train.py takes latents, and builds no VAE
