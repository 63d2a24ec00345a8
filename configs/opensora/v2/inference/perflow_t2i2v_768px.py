# As perflow_t2i2v_256px.py at 768px.

_base_ = ["perflow_t2i2v_256px.py"]

sampling_option = dict(resolution="768px")
