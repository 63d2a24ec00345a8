# Distillation without data, for Open-Sora 1.2: as stage 2, whose windows start where the student itself arrives from noise,
# so that of a video only its caption and size are used. Here there are no videos: captions.csv needs a column `text`, and the
# VAE is given blank ones.
#   torchrun --nproc_per_node 8 scripts/train.py configs/opensora/perflow_data_free.py --data-path captions.csv

_base_ = ["_base_/runtime.py", "_base_/v1_2.py", "_base_/stage2.py"]

custom_imports = dict(imports=["opensora_perflow", "opensora_perflow.hosts.captions"], allow_failed_imports=False)

scheduler = dict(
    teacher=dict(from_pretrained="hpcai-tech/OpenSora-STDiT-v3"),
    draws=dict(starts="student"),  # as in stage 2; diffused starts would learn the blank videos
)
dataset = dict(
    _delete_=True,
    type="perflow_captions",
    num_frames=103,  # used where the table has no such column; buckets take what is longer than they are
    image_size=(360, 640),  # height, width; likewise
)
