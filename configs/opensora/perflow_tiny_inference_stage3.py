# Few-step sampling on a laptop, student of the tiny stage 3.

_base_ = ["perflow_tiny_inference.py"]

scheduler = dict(windows=2, num_sampling_steps=2, guidance=dict(mode="fixed", scale=1.0))
