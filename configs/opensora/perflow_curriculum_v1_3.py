# From 8 windows to 1 for Open-Sora 1.3, in one run that moves on by itself; the log has a line for every stage.
# Sample with perflow_inference_stage2_v1_3.py and the windows of the last stage that the log names, for example
# scheduler=dict(windows=1, num_sampling_steps=1).
#   torchrun --nproc_per_node 8 scripts/train.py configs/opensora/perflow_curriculum_v1_3.py --data-path videos.csv

_base_ = ["_base_/runtime.py", "_base_/v1_3.py", "_base_/curriculum.py"]

scheduler = dict(
    teacher=dict(from_pretrained="hpcai-tech/OpenSora-STDiT-v4"),
    guidance=dict(mode="fixed", scale=7.5),
    use_flaw_fix=True,  # as upstream samples 1.3
)
lr = 1e-5
