# The recipe on a laptop: Open-Sora 2.0's own network with 1 M random weights, and stand-ins for T5, CLIP and the VAE.
#   python -m opensora_perflow.run ../Open-Sora/scripts/diffusion/train.py configs/opensora/v2/train/perflow_tiny.py \
#       --dataset.data-path clips.csv --exp_name tiny
# Clips of at least 10 frames and 64 x 64 pixels. A teacher of random weights draws noise: this shows that everything runs.

_base_ = ["perflow_256px.py"]

custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.v2.tiny"], allow_failed_imports=False)

model = dict(
    perflow=dict(watch=dict(every=8)),
    from_pretrained=None,
    grad_ckpt_settings=(100, 100),
    vec_in_dim=16,
    context_in_dim=32,
    hidden_size=96,
    num_heads=4,
    depth=2,
    depth_single_blocks=2,
    axes_dim=[8, 8, 8],
)
ae = dict(_delete_=True, type="perflow_tiny_hunyuan_vae")
t5 = dict(_delete_=True, type="perflow_tiny_t5", output_dim=32)
clip = dict(_delete_=True, type="perflow_tiny_clip", output_dim=16)

bucket_config = {"_delete_": True, "64px": {9: (1.0, 2)}}  # 64 x 64, 9 frames, two clips a step
optim = dict(lr=1e-3)
plugin_config = dict(reduce_bucket_size_in_m=1)
prefetch_factor = None
num_workers = 0  # load the data in the training process
num_bucket_build_workers = 1
epochs = 2
log_every = 1
ckpt_every = 2  # steps
ema_decay = 0.5  # of so few steps the rule would keep the last alone
