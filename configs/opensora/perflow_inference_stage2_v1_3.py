# Few-step sampling with Open-Sora 1.3, student of stage 2: guidance is in the weights, so each step is one evaluation.
#   python scripts/inference.py configs/opensora/perflow_inference_stage2_v1_3.py \
#       --ckpt-path student --prompt "a beautiful waterfall"

_base_ = ["perflow_inference_v1_3.py"]

scheduler = dict(guidance=dict(mode="fixed", scale=7.5))
