# Few-step sampling on a laptop, student of the tiny stage 2. For one of stage 3 set windows=2 and num_sampling_steps=2 as well.

_base_ = ["perflow_tiny_inference.py"]

scheduler = dict(guidance=dict(mode="fixed", scale=3.0))
