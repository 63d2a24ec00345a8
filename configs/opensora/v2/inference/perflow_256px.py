# Four steps of Open-Sora 2.0 at 256px, for a student of any of our training configs.
#   torchrun --nproc_per_node 1 --standalone scripts/diffusion/inference.py CONFIG --prompt "raining, sea" \
#       --ckpt_path student
# A student of LoRA has the base model's weights besides its own:
#       --pretrained_lora_path student/lora
# Given frames: --cond_type i2v_head --ref image.png
#
# It is a fragment, too. Beside those of Open-Sora, in its folder configs/diffusion/inference:
#   _base_ = ["perflow_256px.py", "plugins/tp.py"]  # or sp.py, t2i2v.py

custom_imports = dict(imports=["opensora_perflow"], allow_failed_imports=False)

save_dir = "samples"
seed = 42  # random seed (except seed for z)
batch_size = 1
dtype = "bf16"
cond_type = "t2v"  # i2v_head, i2v_tail, i2v_loop, v2v_head_half, v2v_tail_half
dataset = dict(type="text")
sampling_option = dict(
    resolution="256px",
    aspect_ratio="16:9",  # 9:16 or 16:9 or 1:1
    num_frames=129,
    num_steps=4,  # one a window: 4 evaluations of the network. A multiple of the student's windows
    shift=True,  # warp time as training does
    temporal_reduction=4,
    is_causal_vae=True,
    # Folded into the student's weights; what follows changes nothing.
    guidance=7.5,
    guidance_img=3.0,
    text_osci=True,
    image_osci=True,
    scale_temporal_osci=True,
    method="i2v",
    seed=None,  # random seed for z; 0 is random, too
)
motion_score = "4"
fps_save = 24

model = dict(
    type="perflow_flux",
    # Windows, guidance and flow_shift are as the perflow.json beside the student's weights says. Without that file:
    # perflow=dict(windows=4, guidance=dict(mode="fixed", scale=7.5)).
    perflow=dict(t2i_steps=50),  # steps of the image model of t2i2v, for which Open-Sora would take num_steps
    from_pretrained="./ckpts/Open_Sora_v2.safetensors",  # --ckpt_path names the student's
    guidance_embed=False,
    fused_qkv=False,
    use_liger_rope=True,
    in_channels=64,
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=19,
    depth_single_blocks=38,
    axes_dim=[16, 56, 56],
    theta=10_000,
    qkv_bias=True,
    cond_embed=True,
)
ae = dict(
    type="hunyuan_vae",
    from_pretrained="./ckpts/hunyuan_vae.safetensors",
    in_channels=3,
    out_channels=3,
    layers_per_block=2,
    latent_channels=16,
    use_spatial_tiling=True,
    use_temporal_tiling=False,
)
t5 = dict(type="text_embedder", from_pretrained="./ckpts/google/t5-v1_1-xxl", max_length=512, shardformer=True)
clip = dict(type="text_embedder", from_pretrained="./ckpts/openai/clip-vit-large-patch14", max_length=77)
