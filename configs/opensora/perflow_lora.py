# Adapters (LoRA) for Open-Sora 1.2 on one card: one network is student and teacher, guidance folded in. Needs peft.
#   torchrun --nproc_per_node 1 scripts/train.py configs/opensora/perflow_lora.py --data-path videos.csv
# To sample: opensora-perflow merge outputs/000-perflow_lora/epoch0-global_step4000 student --base hpcai-tech/OpenSora-STDiT-v3
# and perflow_inference.py with --ckpt-path student.

_base_ = ["_base_/runtime.py", "_base_/v1_2.py", "_base_/stage2.py"]

model = dict(
    _delete_=True,
    type="perflow_lora",
    base={{_base_.model}},  # its from_pretrained is what teaches; --ckpt-path takes its place
    rank=16,  # of each adapter, >= 1
    alpha=None,  # what an adapter adds is multiplied by alpha / rank; None = rank
    targets=None,  # names of linear layers; None = all
)
# Not measured: raise the batch sizes while memory allows.
bucket_config = {
    "_delete_": True,
    "144p": {1: (1.0, 16), 51: (1.0, 4), 102: (1.0, 2)},
    "240p": {1: (0.3, 8), 51: (0.5, 2), 102: (0.5, 1)},
}
lr = 2e-4  # of adapters, which start at zero
