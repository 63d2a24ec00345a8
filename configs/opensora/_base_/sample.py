# What every inference run shares. Keys are those of Open-Sora's scripts/inference.py.
# --ckpt-path names what `opensora-perflow export outputs/000-.../epoch0-global_step4000` wrote: the folder student/, with the
# average of the training's weights. A checkpoint of train.py itself has those of one step, which err more.

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
condition_frame_length = 5  # latent frames carried from loop to loop: fewer than a clip has (v1.2: a multiple of 5)
aes = 6.5  # aesthetic score appended to the prompt
flow = None

# For a student of any stage: windows, guidance and the number of steps are as the perflow.json beside its weights says.
# Without that file: windows=4, guidance=dict(mode="sync") and a step a window.
scheduler = dict(
    type="perflow",
    use_timestep_transform=True,
    cfg_scale=7.0,  # guidance (--cfg-scale), >= 0, of a student of stage 1; folded in later
)
