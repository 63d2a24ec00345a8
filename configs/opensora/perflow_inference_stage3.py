# Few-step sampling with Open-Sora 1.2, student of stage 3: two windows, guidance in the weights, so two evaluations a sample.
#   python scripts/inference.py configs/opensora/perflow_inference_stage3.py \
#       --ckpt-path student --prompt "a beautiful waterfall"

_base_ = ["perflow_inference.py"]

scheduler = dict(windows=2, num_sampling_steps=2, guidance=dict(mode="fixed", scale=1.0))
