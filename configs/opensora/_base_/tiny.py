# Stand-ins that fit a laptop: the host's real STDiT3 class at hidden 96, and the demo's VAE and text encoder.
# For v1.2.0 and v1.3 alike; start with `python -m opensora_perflow.run`, which supplies what a CPU lacks.

model = dict(
    type="perflow_tiny_stdit3",
    from_pretrained=None,
    hidden_size=96,  # a multiple of 4 and of 2 * num_heads
    depth=2,  # pairs of a spatial and a temporal block
    num_heads=4,
    qk_norm=True,
    enable_flash_attn=False,
    enable_layernorm_kernel=False,
)
vae = dict(type="perflow_tiny_vae")
text_encoder = dict(type="perflow_tiny_text")
