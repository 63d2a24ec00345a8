# Few-step sampling with Open-Sora 1.3, student of any stage; also for scripts/inference_i2v.py, if the student was trained with
# mask_types (see Open-Sora's configs/opensora-v1-3/train): the stages here train text to video alone.
#   python scripts/inference.py configs/opensora/perflow_inference_v1_3.py --ckpt-path student \
#       --prompt "a beautiful waterfall"

_base_ = ["_base_/sample.py"]

num_frames = 49  # pixel frames: 49, 65, 81, 97 or 113
resolution = "360p"
scheduler = dict(cfg_scale=7.5, use_flaw_fix=True)  # as upstream samples 1.3
model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,  # --ckpt-path
    qk_norm=True,
    enable_flash_attn=True,  # needs flash-attn; else --flash-attn False
    enable_layernorm_kernel=True,  # needs apex; else --layernorm-kernel False
    kernel_size=(8, 8, -1),
    use_spatial_rope=True,
)
vae = dict(
    type="OpenSoraVAE_V1_3",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.3",
    z_channels=16,
    micro_batch_size=1,
    micro_batch_size_2d=4,
    micro_frame_size=17,
    use_tiled_conv3d=True,
    tile_size=4,
    normalization="video",
    temporal_overlap=True,
    force_huggingface=True,
)
text_encoder = dict(type="t5", from_pretrained="DeepFloyd/t5-v1_1-xxl", model_max_length=300)
