# Few-step sampling with Open-Sora 1.2, student of any stage.
#   python scripts/inference.py configs/opensora/perflow_inference.py --ckpt-path student \
#       --prompt "a beautiful waterfall"

_base_ = ["_base_/sample.py"]

num_frames = 51  # pixel frames; 17 of them are 5 latent frames
align = 5  # latent frames that references are aligned to
model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,  # --ckpt-path
    qk_norm=True,
    enable_flash_attn=True,  # needs flash-attn; else --flash-attn False
    enable_layernorm_kernel=True,  # needs apex; else --layernorm-kernel False
)
vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=17,
    micro_batch_size=4,
)
text_encoder = dict(type="t5", from_pretrained="DeepFloyd/t5-v1_1-xxl", model_max_length=300)
