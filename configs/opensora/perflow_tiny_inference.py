# Few-step sampling on a laptop; --ckpt-path names a checkpoint of any tiny stage.
#   python -m opensora_perflow.run ../Open-Sora/scripts/inference.py configs/opensora/perflow_tiny_inference.py \
#       --ckpt-path outputs/000-perflow_tiny_stdit3/epoch3-global_step16 --prompt "a red circle moving right"
# A --loop keeps the last 5 latent frames of a clip (condition_frame_length), which are all that 17 frames have. So add:
#   v1.2: --loop 3 --num-frames 34                 68 frames
#   v1.3: --loop 3 --condition-frame-length 2      34 frames

_base_ = ["_base_/sample.py", "_base_/tiny.py"]

custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.tiny"], allow_failed_imports=False)

num_frames = 17
image_size = (192, 192)
aes = None  # the teacher knows no aesthetic scores
save_fps = 8
dtype = "fp32"
scheduler = dict(cfg_scale=3.0)
