# Network, VAE, text encoder and buckets of Open-Sora 1.2. Use with a checkout of v1.2.0.

model = dict(
    type="STDiT3-XL/2",
    from_pretrained="hpcai-tech/OpenSora-STDiT-v3",  # or --ckpt-path
    qk_norm=True,
    enable_flash_attn=True,  # needs flash-attn; else start with --flash-attn False
    enable_layernorm_kernel=True,  # needs apex; else start with --layernorm-kernel False
    freeze_y_embedder=True,
)
vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=17,  # frames encoded at once
    micro_batch_size=4,  # videos encoded at once
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,  # tokens
    shardformer=True,
)
dataset = dict(type="VariableVideoTextDataset", transform_name="resize_crop")  # add --data-path videos.csv

# resolution: {frames: (share of the videos that fit, batch size per GPU)}. Teacher and student are both in memory:
# start from half of the batch that plain training fits.
bucket_config = {
    "144p": {1: (1.0, 64), 51: (1.0, 16), 102: (1.0, 8)},
    "240p": {1: (0.3, 32), 51: (0.5, 8), 102: (0.5, 4)},
    "360p": {1: (0.2, 16), 51: (0.3, 4), 102: (0.3, 2)},
}
