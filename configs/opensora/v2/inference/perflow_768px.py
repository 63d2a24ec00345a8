# Four steps of Open-Sora 2.0 at 768px on one GPU. On several, with Open-Sora's sequence parallelism, from its own folder:
#   _base_ = ["perflow_768px.py", "plugins/sp.py"]

_base_ = ["perflow_256px.py"]

sampling_option = dict(resolution="768px")
