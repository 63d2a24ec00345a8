# Adapters (LoRA) for Open-Sora 1.3 on one card: one network is student and teacher, guidance folded in. Needs peft.
#   torchrun --nproc_per_node 1 scripts/train.py configs/opensora/perflow_lora_v1_3.py --data-path videos.csv
# To sample: opensora-perflow merge outputs/000-perflow_lora/epoch0-global_step4000 student --base hpcai-tech/OpenSora-STDiT-v4
# and perflow_inference_v1_3.py with --ckpt-path student.

_base_ = ["_base_/runtime.py", "_base_/v1_3.py", "_base_/stage2.py"]

model = dict(
    _delete_=True,
    type="perflow_lora",
    base={{_base_.model}},  # its from_pretrained is what teaches; --ckpt-path takes its place
    rank=16,  # of each adapter, >= 1
    alpha=None,  # what an adapter adds is multiplied by alpha / rank; None = rank
    targets=None,  # names of linear layers; None = all
)
scheduler = dict(guidance=dict(mode="fixed", scale=7.5), use_flaw_fix=True)
# Not measured: raise the batch sizes while memory allows.
bucket_config = {
    "_delete_": True,
    "360p": {1: (1.0, 8), 49: (1.0, 1)},
}
lr = 2e-4  # of adapters, which start at zero
