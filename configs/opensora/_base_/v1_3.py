# Network, VAE, text encoder and buckets of Open-Sora 1.3. Use with a checkout of v1.3.

model = dict(
    type="STDiT3-XL/2",
    from_pretrained="hpcai-tech/OpenSora-STDiT-v4",  # or --ckpt-path
    qk_norm=True,
    enable_flash_attn=True,  # needs flash-attn; else start with --flash-attn False
    enable_layernorm_kernel=True,  # needs apex; else start with --layernorm-kernel False
    kernel_size=(8, 8, -1),  # attention window: height, width, all frames
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
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,  # tokens
    shardformer=True,
)
dataset = dict(type="VariableVideoTextDataset", transform_name="resize_crop")  # add --data-path videos.csv

# resolution: {frames: (share of the videos that fit, batch size per GPU)}. Teacher and student are both in memory.
bucket_config = {
    "360p": {1: (1.0, 16), 49: (1.0, 2), 65: (1.0, 1), 97: (1.0, 1), 113: (1.0, 1)},
}
