# As perflow_256px.py at 768px as well, with Open-Sora's sequence parallelism of stage 2, whose ring attention was not run.
#   torchrun --nproc_per_node 8 scripts/diffusion/train.py CONFIG --dataset.data-path videos.csv --exp_name full_768px
#
# Four GPUs share one video of 77,000 tokens. Weights of student, teacher and encoders are whole on each of them, see
# perflow_256px.py, and the teacher takes the whole sequence on each. LoRA's teacher is the student's network, so it is split.

_base_ = ["perflow_256px.py"]

model = dict(grad_ckpt_settings=(100, 100))
plugin = "hybrid"
plugin_config = dict(
    tp_size=1,
    pp_size=1,  # more stages are refused: the loss does not reach them
    sp_size=4,
    sequence_parallelism_mode="ring_attn",
    enable_sequence_parallelism=True,
    static_graph=True,
    zero_stage=2,
)
bucket_config = {"768px": {1: (0.5, 2), 33: (1.0, 1), 65: (1.0, 1), 97: (1.0, 1), 129: (1.0, 1)}}
