# What every inference run shares. Keys are those of Open-Sora's scripts/inference.py.

custom_imports = dict(imports=["opensora_perflow"], allow_failed_imports=False)

resolution = "240p"
aspect_ratio = "9:16"
fps = 24  # frames per second that the network is told
frame_interval = 1
save_fps = 24  # of the mp4
save_dir = "./samples/perflow/"
seed = 42
batch_size = 1
multi_resolution = "STDiT2"  # sends height, width and length to the network and to the timestep transform
dtype = "bf16"  # bf16, fp16 or fp32
condition_frame_length = 5  # latent frames carried from loop to loop
aes = 6.5  # aesthetic score appended to the prompt
flow = None

# For a student of stage 1, guided while it is sampled. Windows must be those it was trained with.
scheduler = dict(
    type="perflow",
    windows=4,
    guidance=dict(mode="sync"),
    use_timestep_transform=True,
    num_sampling_steps=4,  # >= 1 (--num-sampling-steps); best a multiple of the number of windows
    cfg_scale=7.0,  # guidance (--cfg-scale), >= 0
)
