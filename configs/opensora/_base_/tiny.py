# Stand-ins that fit a laptop: the host's real STDiT3 class in the size of the demo's teacher, and the demo's VAE and text
# encoder. The teacher draws coloured shapes that move, such as "a red circle moving right".
# For v1.2.0 and v1.3 alike; start with `python -m opensora_perflow.run`, which supplies what a CPU lacks.

model = dict(
    type="perflow_tiny_stdit3",
    from_pretrained="perflow_tiny_teacher",  # ships with the package; None = random weights
    hidden_size=96,  # a multiple of 4 and of 2 * num_heads
    depth=3,  # pairs of a spatial and a temporal block
    num_heads=4,
    input_sq_size=1536,  # 192 x 192 here are the 64 x 64 that the teacher was trained on
    qk_norm=True,
    enable_flash_attn=False,
    enable_layernorm_kernel=False,
)
vae = dict(type="perflow_tiny_vae", shrink=3)  # sides of the video are multiples of 24
text_encoder = dict(type="perflow_tiny_text")
