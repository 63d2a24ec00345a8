# Distillation without data, for Open-Sora 1.2: windows start where the student itself arrives from noise, so captions and
# sizes are all that is learned from. The videos of the CSV give their sizes and nothing else: their content never reaches
# the loss (frames that mask_ratios would freeze are the exception; there are none here).
#   torchrun --nproc_per_node 8 scripts/train.py configs/opensora/perflow_data_free.py --data-path videos.csv

_base_ = ["_base_/runtime.py", "_base_/v1_2.py", "_base_/stage2.py"]

scheduler = dict(
    teacher=dict(from_pretrained="hpcai-tech/OpenSora-STDiT-v3"),
    draws=dict(starts="student"),  # up to 3 evaluations of the student before each solution of the teacher (windows=4)
)
