# Few-step sampling on a laptop, student of the tiny stage 2.

_base_ = ["perflow_tiny_inference.py"]

scheduler = dict(guidance=dict(mode="fixed", scale=3.0))
