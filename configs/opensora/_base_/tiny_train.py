# Training on a laptop: Open-Sora v1.2.0 or v1.3 on a CPU, clips of at least 18 frames and 192 x 192 pixels.

_base_ = ["runtime.py", "tiny.py"]

custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.tiny"], allow_failed_imports=False)

dataset = dict(type="VariableVideoTextDataset", transform_name="resize_crop")  # add --data-path clips.csv
bucket_config = {"144p": {17: (1.0, 1)}}  # 192 x 192, 17 frames, one clip a step
num_workers = 0  # load the data in the training process
num_bucket_build_workers = 1
grad_checkpoint = False
epochs = 4  # passes over the clips
log_every = 1
ckpt_every = 8  # steps
lr = 2e-4
ema_decay = 0.375  # 1 - 10 / steps: 16, with four clips
warmup_steps = None  # no warm-up
