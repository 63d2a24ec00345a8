# A 4-step student of Open-Sora 2.0 at 256px, all of its weights trained. Begin with perflow_256px_lora.py, which needs less.
#   torchrun --nproc_per_node 8 scripts/diffusion/train.py CONFIG --dataset.data-path videos.csv --exp_name full
#
# Memory of each GPU, counted, not measured (11.9 B parameters, bfloat16, ZeRO-2 over 8 GPUs): student 24 GB, teacher 24 GB, a
# share of gradients, of AdamW's float32 states and of the average 27 GB, T5, CLIP and VAE 10 GB: 84 GB without activations. So
# 80 GB do not hold it on 8 GPUs; on 16 the share is 13 GB.

custom_imports = dict(imports=["opensora_perflow"], allow_failed_imports=False)

# The recipe. The command line reaches two levels of a config, so change these keys in a child config.
model = dict(
    type="perflow_flux",
    perflow=dict(
        windows=4,  # number of uniform windows, or edges such as [1, 0.75, 0.5, 0.25, 0]
        guidance=dict(
            mode="fixed",  # folded in: a step of the sampler is 1 evaluation instead of 3
            # One scale a window, noisiest first: the mean of Open-Sora's guidance 7.5 with text_osci over each quarter of its
            # 50 steps.
            scale=[6.98, 4.38, 4.12, 4.12],
            image_scale=3.0,  # of reference frames, >= 0, as guidance_img
        ),
        teacher=dict(
            from_pretrained=None,  # None: model.from_pretrained, also where --load goes on with a student
            steps_per_window=None,  # ODE steps a window, >= 1; None = 8 over the number of windows
            solver="midpoint",  # or euler (one evaluation a step instead of two)
        ),
        draws=dict(
            starts="student",  # windows start where the student itself arrives from noise; of videos only the size counts
            edge_mass=0.75,  # share of the times at the window's noisy edge, 0..1
            per_solve=1,  # times that one solution of the teacher feeds, >= 1: rows of the student's one call with gradient
        ),
        objective="perflow",
    ),
    from_pretrained="./ckpts/Open_Sora_v2.safetensors",  # the teacher, where the student begins
    strict_load=False,
    guidance_embed=False,
    fused_qkv=False,
    use_liger_rope=True,
    grad_ckpt_settings=(8, 100),  # double and single blocks that are checkpointed
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
    cond_embed=True,  # the released weights have it
)
dropout_ratio = None  # a dropped text teaches a student of folded guidance nothing
ae = dict(
    type="perflow_hunyuan_vae",  # hunyuan_vae with the attribute that image-to-video training reads
    from_pretrained="./ckpts/hunyuan_vae.safetensors",
    in_channels=3,
    out_channels=3,
    layers_per_block=2,
    latent_channels=16,
    use_spatial_tiling=True,
    use_temporal_tiling=False,
)
is_causal_vae = True
t5 = dict(
    type="perflow_t5",  # text_embedder that notes the empty prompt, which guidance leads away from
    from_pretrained="./ckpts/google/t5-v1_1-xxl",
    max_length=512,  # tokens
    shardformer=True,
)
clip = dict(type="perflow_clip", from_pretrained="./ckpts/openai/clip-vit-large-patch14", max_length=77)

dataset = dict(
    type="video_text",
    transform_name="resize_crop",
    fps_max=24,
    vmaf=True,  # adds the column score_vmafmotion, if there is one, to the text as a motion score
    memory_efficient=False,
)
# resolution: {frames: (share of the videos that fit, batch size of each GPU)}
bucket_config = {"256px": {1: (1.0, 4), 33: (1.0, 1), 65: (1.0, 1), 97: (1.0, 1), 129: (1.0, 1)}}

# The student starts as the teacher, so the learning rate is that of fine-tuning.
optim = dict(cls="HybridAdam", lr=1e-5, eps=1e-15, weight_decay=0.0, adamw_mode=True)
warmup_steps = 0
update_warmup_steps = True
grad_clip = 1.0
accumulation_steps = 1
# Of the average of the weights, which is the student: ema.safetensors in each checkpoint, 48 GB, `opensora-perflow export`.
# 1 - 10 / steps of the run, which are 4,000 here; see docs/recipes.md. None: no average.
ema_decay = 0.9975

prefetch_factor = 2
num_workers = 12  # data loading processes of each GPU
num_bucket_build_workers = 16  # processes that sort the videos into buckets, once at the start
dtype = "bf16"
plugin = "zero2"
plugin_config = dict(reduce_bucket_size_in_m=128, overlap_allgather=False)
grad_checkpoint = True
async_io = False  # True needs TensorNVMe, as do the master weights below
save_master_weights = False  # checkpoints have the folder perflow_masters instead, 48 GB
load_master_weights = False

seed = 42
outputs = "outputs"  # folder; every run makes one in it, --exp_name names it
epochs = 1000  # passes over the data; stop when the samples are good
log_every = 10  # steps
ckpt_every = 200  # steps; folders epochE-global_stepG
keep_n_latest = 20
wandb_project = "mmdit"
