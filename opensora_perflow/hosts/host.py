"""What the scripts of all Open-Sora versions answer a training run alike, see `training.host.Host`."""

from opensora_perflow.hosts import optimizer, parallel, saving, script


class OpenSoraScript:
    """The Open-Sora script that is calling; where none is, the process stands alone."""

    seed = staticmethod(script.host_seed)
    trained_students = staticmethod(script.trained_students)
    before_each_save = staticmethod(saving.before_each_save)
    rank = staticmethod(parallel.data_parallel_rank)
    mean = staticmethod(parallel.mean_over_ranks)
    average = staticmethod(parallel.average_over_ranks)
    gathered = staticmethod(parallel.gathered)
    shared = staticmethod(parallel.shared)
    folder = staticmethod(optimizer.folder)
    log_scalars = staticmethod(optimizer.log_scalars)
    device = staticmethod(optimizer.device)
    ema = staticmethod(optimizer.ema)
    rate = staticmethod(optimizer.rate)
    scale_rate = staticmethod(optimizer.scale_rate)
    keep_state = staticmethod(optimizer.keep_state)
