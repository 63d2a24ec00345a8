# Four steps on a laptop, for a student of train/perflow_tiny.py.
#   python -m opensora_perflow.run ../Open-Sora/scripts/diffusion/inference.py configs/opensora/v2/inference/perflow_tiny.py \
#       --ckpt_path student --prompt "a red circle moving right"

_base_ = ["perflow_256px.py"]

custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.v2.tiny"], allow_failed_imports=False)

sampling_option = dict(resolution="64px", aspect_ratio="1:1", num_frames=9)
num_workers = 0
model = dict(
    from_pretrained=None,  # --ckpt_path
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
