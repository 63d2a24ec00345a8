# What every training run shares. Keys are those of Open-Sora's scripts/train.py.

# Registers `perflow`; no file of Open-Sora changes.
custom_imports = dict(imports=["opensora_perflow"], allow_failed_imports=False)

# Acceleration
num_workers = 8  # data loading processes per GPU
num_bucket_build_workers = 16  # processes that sort the videos into buckets, once at the start
dtype = "bf16"  # bf16 or fp16; the master weights are float32 either way
plugin = "zero2"  # ColossalAI: zero2 shards gradients and optimizer states over the GPUs
grad_checkpoint = True  # of the student only: a twentieth of the activations' memory for a third more time

# Log and checkpoints
seed = 42
outputs = "outputs"  # folder; every run makes a numbered one in it
wandb = False
epochs = 1000  # passes over the data; stop when the samples are good
log_every = 10  # steps
ckpt_every = 200  # steps; folders epochE-global_stepG

# Optimization. The student starts as the teacher, so the learning rate is that of fine-tuning.
load = None  # checkpoint folder to resume from; then scheduler.teacher needs from_pretrained
lr = 2e-5  # > 0
warmup_steps = 200  # steps of linear warm-up, >= 0
grad_clip = 1.0  # largest gradient norm, 0 = off
adam_eps = 1e-15  # >= 0, as upstream
# Of the average of the weights, which is the student: ema.pt in each checkpoint, `opensora-perflow export`. 1 - 10 / steps of
# the run, which are 4,000 here; see docs/recipes.md.
ema_decay = 0.9975
