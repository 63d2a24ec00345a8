# As perflow_tiny.py, with given frames in seven of eight videos.

_base_ = ["perflow_tiny.py", "perflow_i2v.py"]
