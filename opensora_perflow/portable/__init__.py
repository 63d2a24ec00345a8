"""Adaptations that let Open-Sora's unmodified scripts run where CUDA, xformers, flash-attn or a compiled kernel is missing.

One small file per adaptation. Each has a `NAME` and an `install()` that looks at the machine and changes something only
where the real thing is missing. Then it logs one line on the logger "opensora_perflow.portable" that names what it
replaced and why. `install()` returns whether it replaced anything. With CUDA and the host's own packages present
nothing is replaced.

Importing this package changes nothing; `activate()` does, and only `opensora_perflow.run` calls it. The code
to be adapted may belong to the host or to ColossalAI. Then the change is armed now and made when that module is
imported. So a script pays for nothing that it does not use (see `imports`).
"""

from __future__ import annotations

from collections.abc import Callable

from opensora_perflow.portable import (
    adam,
    async_writer,
    cached_download,
    compilation,
    cpu_accelerator,
    cuda_broadcasts,
    cuda_queue,
    device_default,
    device_setup,
    flash_attention,
    liger_kernels,
    mp4_codec,
    pinned_memory,
    process_group,
    pyav_error,
    script_assert,
    text_dropout,
    world_of_one,
    xformers_attention,
    zero_optimizer,
    zero_stores,
)

INSTALLERS: dict[str, Callable[[], bool]] = {
    module.NAME: module.install
    for module in (
        xformers_attention,
        cached_download,
        pyav_error,
        script_assert,
        cuda_queue,
        process_group,
        cpu_accelerator,
        zero_optimizer,
        adam,
        zero_stores,
        text_dropout,
        device_default,
        mp4_codec,
        flash_attention,
        liger_kernels,
        async_writer,
        device_setup,
        cuda_broadcasts,
        pinned_memory,
        compilation,
        world_of_one,
    )
}
"""Every adaptation by name, in the order in which they are asked; none depends on another having been installed."""

_active: dict[str, bool] = {}


def activate() -> list[str]:
    """Ask every adaptation to install itself; safe to call more than once.

    Call it after the host's folder is on sys.path and before the script is started. Some adaptations read the host's source to
    see whether it needs them.

    Returns:
        Names of the adaptations switched on in this process, in order; [] on a machine that lacks nothing.
    """
    for name, install in INSTALLERS.items():
        if name not in _active:
            _active[name] = install()
    return [name for name in INSTALLERS if _active[name]]


__all__ = ["INSTALLERS", "activate"]
